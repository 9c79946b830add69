"""Float models from timm, with weights from timm or from a local file, loaded strictly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model, split_model_name_tag
from torch import Tensor, nn

from qat.errors import QatError, first_line
from qat.preprocessing import Preprocessing

log = logging.getLogger(__name__)
PRETRAINED = "pretrained"
WRAPPERS = ("state_dict", "model", "module")  # where checkpoints keep their weights
PREFIXES = ("model.", "module.")  # added to names by a LightningModule or by DDP


def check_arch(arch: str) -> None:
    """Raise QatError for a name, or tag, that timm does not know."""
    name, tag = split_model_name_tag(arch)
    if not is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise QatError(f"timm {timm.__version__} has no model {name!r}{hint}")
    try:
        known = not tag or get_pretrained_cfg(arch, allow_unregistered=False) is not None
    except RuntimeError:
        known = False
    if not known:
        raise QatError(f"timm {timm.__version__} has no weights {tag!r} for {name!r}")


def default_preprocessing(arch: str, model_args: Mapping[str, Any] | None = None) -> Preprocessing:
    """The evaluation transform that timm states for ``arch``, with the image size of ``model_args`` if it has one."""
    check_arch(arch)
    cfg = get_pretrained_cfg(arch)
    data = resolve_data_config({}, pretrained_cfg=cfg.to_dict() if cfg else {})
    if data.get("crop_mode", "center") != "center":
        log.warning("%s: timm evaluates with crop mode %r, qat with a centre crop", arch, data["crop_mode"])
    size = data["input_size"][-1]
    plain = Preprocessing(size, int(size / data["crop_pct"]), data["interpolation"], data["mean"], data["std"])
    size = (model_args or {}).get("img_size")
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise QatError(f"model.model_args.img_size is {list(size)}: only square images are supported")
        size = size[0]
    return plain.override({"size": size})


def build_float(
    arch: str,
    checkpoint: str | Path | None = PRETRAINED,
    num_classes: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    fresh_head: bool = False,
) -> nn.Module:
    """A timm model with float weights.

    Args:
        arch: timm model name, with or without a tag.
        checkpoint: ``pretrained`` (the weights timm names), a ``.safetensors``, ``.pth`` or ``.ckpt`` file, or None
            for random weights.
        num_classes: classes of the head; None keeps what the architecture has.
        model_args: further arguments of the timm constructor, such as ``img_size`` or ``drop_path_rate``.
        fresh_head: keep the random head and ignore the head of the checkpoint.

    Raises:
        QatError: unknown name, argument or file, or weights that do not fit, naming what is missing.
    """
    check_arch(arch)
    options = dict(model_args or {})
    if num_classes is not None:
        options["num_classes"] = num_classes
    if checkpoint == PRETRAINED and not fresh_head:
        options["pretrained"] = True
        if num_classes not in (None, _cfg_classes(arch)):
            raise _head_error(f"the weights of {arch}", _cfg_classes(arch), num_classes)
    try:
        model: nn.Module = timm.create_model(arch, **options)
    except (TypeError, AssertionError) as error:
        raise QatError(f"model.model_args: {arch} does not take {dict(model_args or {})}: {error}") from None
    except (OSError, RuntimeError) as error:
        if "pretrained" not in options:
            raise
        raise _download_error(arch, error) from None
    if checkpoint == PRETRAINED and fresh_head:
        load_strictly(model, _pretrained_weights(arch, options), f"the weights of {arch}", fresh_head=True)
    elif checkpoint is not None and checkpoint != PRETRAINED:
        load_strictly(model, read_weights(checkpoint), str(checkpoint), fresh_head)
    return model


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a local file, without the wrappers of usual checkpoints; QatError if there are none."""
    path = Path(path)
    if not path.is_file():
        raise QatError(f"no file {path} of weights: give a .safetensors, .pth or .ckpt file, or 'pretrained'")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise QatError(f"cannot read the weights {path}: {first_line(error)}") from None
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise QatError(f"{path} holds no table of weights")
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str, fresh_head: bool = False) -> None:
    """Load ``state`` into ``model``; QatError says exactly which names are missing, unexpected or of another shape."""
    own = model.state_dict()
    born = [f"{name}.bias" for name, module in model.named_modules() if getattr(module, "born_bias", False)]
    state = {name: own[name] for name in born} | dict(state)  # biases that the float layers do not have
    if fresh_head:
        heads = _heads(model)
        state = {name: value for name, value in state.items() if not name.startswith(heads)}
        state.update({name: value for name, value in own.items() if name.startswith(heads)})
        log.info("fresh head: %s start from random weights", ", ".join(sorted(n for n in own if n.startswith(heads))))
    _check_names(own, state, source)
    _check_shapes(model, own, state, source)
    model.load_state_dict(state, strict=True)


def _check_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    if not missing and not extra:
        return
    steps = [name for name in extra if name.endswith(("_quant.step", "_quant.offset"))]
    parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
    parts += [f"{len(extra)} unexpected ({_some(extra)})"] if extra else []
    hint = "; it holds quantizer steps, so it is a quantized checkpoint: use --ckpt" if steps else ""
    raise QatError(f"{source} does not fit the model: {', '.join(parts)}{hint}")


def _check_shapes(model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    wrong = [name for name, value in own.items() if state[name].shape != value.shape]
    if not wrong:
        return
    name = wrong[0]
    if all(n.startswith(_heads(model)) for n in wrong):
        raise _head_error(source, state[name].shape[0], own[name].shape[0])
    ours, theirs = tuple(own[name].shape), tuple(state[name].shape)
    raise QatError(f"{source}: {len(wrong)} weights have another shape, the first is {name!r}: {theirs}, not {ours}")


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters of the classifier, from the timm configuration of the model."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _cfg_classes(arch: str) -> int | None:
    cfg = get_pretrained_cfg(arch)
    return cfg.num_classes if cfg else None


def _pretrained_weights(arch: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        kept = {name: value for name, value in options.items() if name != "num_classes"}
        return dict(timm.create_model(arch, pretrained=True, **kept).state_dict())
    except (OSError, RuntimeError) as error:
        raise _download_error(arch, error) from None


def _head_error(source: str, theirs: int | None, ours: int | None) -> QatError:
    return QatError(
        f"{source} has a head of {theirs} classes, {ours} are needed: "
        "a student can start from a new, untrained head with --model.fresh_head true"
    )


def _download_error(arch: str, error: Exception) -> QatError:
    return QatError(
        f"cannot get the pretrained weights of {arch} ({first_line(error)}): "
        "pass a local file as --model.checkpoint FILE, or --model.checkpoint null for random weights"
    )
