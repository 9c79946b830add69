"""Checkpoints that describe themselves: everything needed to rebuild the model lies beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import QatError, first_line
from qat.models import build_float
from qat.recipe import Rule
from qat.sites.insert import quantize

KEY = "qat"
FORMAT = 1
AVERAGED = "current_model_state"  # where a weight average puts the weights that training goes on from
PREFIX = "model."  # what the LightningModule puts before every name of the timm model


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of its model; plain data only, so it loads under ``weights_only=True``.

    Args:
        arch: timm model name.
        model_args: further arguments of the timm constructor.
        num_classes: outputs of the head.
        rules: the resolved recipe, widths as integers.
        preprocessing: fields of `Preprocessing`.
        classes: class names in label order, empty when unknown.
    """

    arch: str
    model_args: dict[str, Any]
    num_classes: int
    rules: list[dict[str, Any]]
    preprocessing: dict[str, Any]
    classes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What is stored under the key ``qat`` of a checkpoint."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], source: str) -> Card:
        """Read what `to_dict` made; QatError for another format."""
        if stored.get("format") != FORMAT:
            raise QatError(f"{source} has format {stored.get('format')}, this version of qat reads format {FORMAT}")
        return cls(**{field.name: stored[field.name] for field in fields(cls)})

    def build(self) -> nn.Module:
        """The quantized model with random weights and uncalibrated steps."""
        model = build_float(self.arch, None, self.num_classes, self.model_args)
        return quantize(model, [Rule.from_dict(rule) for rule in self.rules]) if self.rules else model


def check_restored(content: Mapping[str, Any], card: Card, fits: bool, averages: bool) -> None:
    """Raise QatError when a checkpoint is of another model than ``card``.

    Args:
        content: of the checkpoint.
        card: of the model that it is restored into.
        fits: training goes on, rather than evaluation.
        averages: the run has a weight average.
    """
    if fits and AVERAGED in content and not averages:
        raise QatError(
            "the checkpoint is of a run with a weight average, which goes on from other weights than these: "
            "add the callback again (--config configs/add/average.yaml)"
        )
    if KEY not in content:
        raise QatError("the checkpoint was not written by `qat fit`: it does not describe its model")
    theirs = Card.from_dict(content[KEY], "the checkpoint")
    for field in ("arch", "model_args", "num_classes", "rules"):
        if getattr(theirs, field) != getattr(card, field):
            raise QatError(f"the checkpoint is of another model: its {field} differs from the one built here")


def read(path: str | Path, option: str = "--ckpt") -> tuple[Card, dict[str, Any]]:
    """The card and the whole content of a checkpoint; QatError if the file is missing or not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise QatError(
            f"no checkpoint {path}: {option} takes a file that qat wrote, such as runs/NAME/DATE/last.ckpt or ptq.ckpt"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise QatError(f"cannot read the checkpoint {path}: {first_line(error)}") from None
    if not isinstance(content, dict) or KEY not in content:
        raise QatError(
            f"{path} does not describe a quantized model, so it was not written by qat; "
            "float weights are given as --model.checkpoint FILE"
        )
    return Card.from_dict(content[KEY], str(path)), content


def load_into(model: nn.Module, card: Card, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint into ``model``, which ``card`` describes, and return what it says of its calibration.

    Raises:
        QatError: no such file, or its model or recipe differs.
    """
    option = "model.quant_checkpoint"
    theirs, content = read(path, f"--{option}")
    for field in ("arch", "model_args", "num_classes", "rules", "preprocessing", "classes"):
        if getattr(theirs, field) != getattr(card, field) and (field != "classes" or (theirs.classes and card.classes)):
            ways = "calibrate with this config" if field == "rules" else "give the options that it was made with"
            raise QatError(f"{option}: {path} is of another model, its {field} differs from this one's: {ways}")
    model.load_state_dict(_weights(content), strict=True)
    calibration: dict[str, Any] = content[KEY].get("calibration", {})
    return calibration


def find_card(path: str | Path) -> Card | None:
    """The card of a file, or None if it is no checkpoint of ours."""
    path = Path(path)
    if path.suffix != ".ckpt" or not path.is_file():
        return None
    try:
        return read(path)[0]
    except QatError:
        return None


def load(path: str | Path) -> nn.Module:
    """The quantized model of a checkpoint, in evaluation mode, on the CPU, from this one file alone."""
    card, content = read(path)
    model = card.build()
    model.load_state_dict(_weights(content), strict=True)
    return model.eval()


def _weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): value for name, value in content["state_dict"].items()}
