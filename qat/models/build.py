"""Float models from timm, with weights from timm or from a local file, loaded strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qat.errors import QatError, first_line
from qat.models.arch import Architecture, find_architecture
from qat.models.hub import quickly, source_of
from qat.models.loading import head_error, load_strictly
from qat.models.weights import read_weights

PRETRAINED = "pretrained"
DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError)  # of the network, the hub and damaged files


def build_float(
    arch: str,
    checkpoint: str | Path | None = PRETRAINED,
    num_classes: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    fresh_head: bool = False,
    checkpoint_key: str | None = None,
) -> nn.Module:
    """A timm model with float weights.

    Args:
        arch: timm model name, with or without a tag; ``hf-hub:REPOSITORY``; or ``local-dir:FOLDER``.
        checkpoint: ``pretrained`` (the weights timm names), a ``.safetensors``, ``.pth`` or ``.ckpt`` file, or None
            for random weights.
        num_classes: classes of the head; None keeps what the architecture has.
        model_args: further arguments of the timm constructor, such as ``img_size`` or ``drop_path_rate``.
        fresh_head: keep the random head and ignore the head of the checkpoint.
        checkpoint_key: table of a file that holds several; averaged weights are taken first when None.

    Raises:
        QatError: unknown name, argument or file, or weights that do not fit, naming what is missing.
    """
    found = find_architecture(arch)
    options = {**found.model_args, **(model_args or {})}
    if num_classes is not None or found.source:
        options["num_classes"] = found.classes if num_classes is None else num_classes
    pretrained = checkpoint == PRETRAINED
    state = None if checkpoint is None or pretrained else read_weights(checkpoint, checkpoint_key)
    if checkpoint_key is not None and state is None:
        raise QatError(f"model.checkpoint_key is {checkpoint_key!r}, but model.checkpoint is no file: leave it out")
    if pretrained and not fresh_head:
        if num_classes not in (None, found.classes):
            raise head_error(f"the weights of {arch}", found.classes, num_classes)
        return _download(arch, options)
    model = _create(found, options)
    if pretrained:
        kept = {name: value for name, value in options.items() if name != "num_classes"}
        load_strictly(model, _download(arch, kept).state_dict(), f"the weights of {arch}", fresh_head=True)
    elif state is not None:
        load_strictly(model, state, str(checkpoint), fresh_head)
    return model


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Stop the building of a model, inside the block, as soon as it has more parameters than it should: QatError."""
    made = 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal made
        made += 1
        if made > parameters:
            raise QatError(f"the model has more than {parameters} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _create(found: Architecture, options: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    try:
        cfg = found.cfg if found.source else None
        model: nn.Module = timm.create_model(found.name, pretrained, pretrained_cfg=cfg, **options)
    except Exception as error:  # a constructor that is given nonsense can raise anything
        if isinstance(error, QatError) or (pretrained and isinstance(error, DOWNLOAD_ERRORS)):
            raise
        raise QatError(f"model.model_args: {found.name} does not take {dict(options)}: {first_line(error)}") from None
    return model


def _download(arch: str, options: Mapping[str, Any]) -> nn.Module:
    """A model with the weights that timm, a folder, or a repository of the hub has for it."""
    found = find_architecture(arch)
    try:
        with quickly(**source_of(found.cfg, found.name)):
            return _create(found, options, pretrained=True)
    except DOWNLOAD_ERRORS as error:
        if "model.model_args" in str(error):
            raise
        raise QatError(
            f"cannot get the pretrained weights of {arch} ({first_line(error)}): "
            "pass a local file as --model.checkpoint FILE, or --model.checkpoint null for random weights"
        ) from None
