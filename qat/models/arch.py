"""Names of models: those of timm, and those that stand for a folder or a repository of the Hugging Face hub.

``deit_tiny_patch16_224`` and ``deit_tiny_patch16_224.fb_in1k`` are timm's; ``hf-hub:timm/deit_small_patch16_224``
and ``local-dir:PATH`` name a ``config.json`` beside weights. A checkpoint always describes its model by timm's name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model, split_model_name_tag
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

from qat.errors import QatError, first_line
from qat.models.hub import CONFIG, quickly
from qat.preprocessing import Preprocessing
from qat.ranges import shown

log = logging.getLogger(__name__)
LONGEST = 100  # characters of a name that is compared with timm's
SOURCES = {"hf-hub": "hf-hub", "hf_hub": "hf-hub", "local-dir": "local-dir"}  # the second is timm's old spelling


@dataclass(frozen=True)
class Architecture:
    """What a name stands for.

    Args:
        name: timm's, with a tag where one was given.
        cfg: timm's configuration of the weights: input size, classes, where they are.
        model_args: what the constructor needs beside the name.
        source: ``hf-hub`` or ``local-dir``; None where the name is timm's own.
    """

    name: str
    cfg: dict[str, Any]
    model_args: dict[str, Any]
    source: str | None = None

    @property
    def classes(self) -> int | None:
        """Outputs of the head of the published weights."""
        return self.cfg.get("num_classes")


def without_tag(name: str) -> str:
    """The name of an architecture without what names its weights: of vit_tiny_patch16_224.augreg, vit_tiny_patch16_224.

    Names of folders and repositories (``local-dir:``, ``hf-hub:``) have no tag.
    """
    return name if ":" in name else str(split_model_name_tag(name)[0])


def check_arch(arch: str) -> None:
    """Raise QatError for a name, or tag, that timm does not know; a folder or the hub is read."""
    find_architecture(arch)


@cache
def find_architecture(arch: str) -> Architecture:
    """What a name stands for; the configuration of a folder, or of a repository of the hub, is read.

    Raises:
        QatError: an unknown name, tag, folder or repository, or a hub that does not answer.
    """
    source, name = _parse(arch)
    if source is None:
        _check_name(name)
        cfg = get_pretrained_cfg(name)
        return Architecture(name, cfg.to_dict() if cfg else {}, {})
    cfg, name, model_args = _read_config(arch, source, name)
    if not isinstance(name, str) or not isinstance(cfg, dict):
        raise QatError(f"model.arch is {arch!r}, but its {CONFIG} does not describe a timm model")
    _check_name(name)
    plain = get_pretrained_cfg(name)
    needed = _needed(cfg, plain.to_dict() if plain else {})
    return Architecture(name, cfg, needed | dict(model_args or {}), source)


def default_preprocessing(arch: str, model_args: Mapping[str, Any] | None = None) -> Preprocessing:
    """The evaluation transform that timm states for ``arch``, with the image size of ``model_args`` if it has one.

    The short side is resized to the size over timm's ``crop_pct``, rounded down.
    """
    found = find_architecture(arch)
    data = resolve_data_config({}, pretrained_cfg=found.cfg)
    if data.get("crop_mode", "center") != "center":
        log.warning("%s: timm evaluates with crop mode %r, qat with a centre crop", arch, data["crop_mode"])
    size = {**found.model_args, **(model_args or {})}.get("img_size") or data["input_size"][-1]
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise QatError(f"model.model_args.img_size is {list(size)}: only square images are supported")
        size = size[0]
    resize = int(size / data["crop_pct"]) if isinstance(size, int) else size
    return Preprocessing(size, resize, data["interpolation"], data["mean"], data["std"], data["crop_pct"])


def has_one_size(arch: str, model_args: Mapping[str, Any] | None = None) -> bool:
    """Whether a model takes images of the size that it is built for, and of no other."""
    options = model_args or {}
    flexible = options.get("dynamic_img_size") or options.get("strict_img_size") is False
    return bool(find_architecture(arch).cfg.get("fixed_input_size")) and not flexible


def _parse(arch: str) -> tuple[str | None, str]:
    """Where a model is described, None for timm itself, and its name there."""
    source, colon, name = arch.partition(":")
    if colon and name and source.lower() in SOURCES:
        return SOURCES[source.lower()], name
    if colon or "/" in arch or "\\" in arch:
        raise QatError(
            f"model.arch is {shown(arch)}: give a name that timm knows, hf-hub:NAME for a repository of the hub, or "
            "local-dir:PATH for a folder with a config.json"
        )
    return None, arch


def _check_name(arch: str) -> None:
    name, tag = split_model_name_tag(arch)
    if not is_model(name):
        names = timm.list_models()
        family = [other for other in names if other.startswith(name.split("_")[0])]
        near = get_close_matches(name[:LONGEST], family or names, n=3, cutoff=0.4 if family else 0.6)
        near = near or [other for other in names if name and name in other][:3]
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise QatError(f"timm {timm.__version__} has no model {shown(name)}{hint}")
    try:
        known = not tag or get_pretrained_cfg(arch, allow_unregistered=False) is not None
    except RuntimeError:
        known = False
    if not known:
        raise QatError(f"timm {timm.__version__} has no weights {shown(tag)} for {name!r}")


def _read_config(arch: str, source: str, name: str) -> tuple[Any, Any, Any]:
    """Configuration, timm name and arguments in the config.json of a folder or of a repository."""
    try:
        if source == "local-dir":
            cfg, model, model_args = load_model_config_from_path(name)
        else:
            with quickly(name, (CONFIG,)):
                cfg, model, model_args = load_model_config_from_hf(name)
    except Exception as error:  # of the network, of the hub, or of a file that is none of timm's
        raise QatError(f"model.arch is {arch!r}, and its {CONFIG} cannot be read: {first_line(error)}") from None
    return cfg, model, model_args


def _needed(cfg: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """What timm takes from the configuration of the weights, where another one would give another model."""
    needed = {}
    if cfg.get("global_pool") not in (None, plain.get("global_pool")):
        needed["global_pool"] = cfg["global_pool"]
    size = list(cfg.get("input_size") or ())
    if cfg.get("fixed_input_size") and size and size != list(plain.get("input_size") or ()):
        needed["img_size"] = size[-1] if size[-1] == size[-2] else size[-2:]
    return needed
