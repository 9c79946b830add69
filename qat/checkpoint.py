"""Checkpoints that describe themselves: a card with everything that rebuilds the model lies beside its weights."""

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
AVERAGED = "current_model_state"  # where a weight average puts the weights that training resumes from
PREFIX = "model."  # what the LightningModule puts before every name of the timm model


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about its model; plain data only, so it loads under ``weights_only=True``.

    This is the one list of what has to agree where a checkpoint meets options or another model.

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

    def options(self) -> dict[str, Any]:
        """The options under ``model`` that the card replaces, with the values that build its model again."""
        resolved = {"recipe": "float", "w_bits": None, "a_bits": None}
        weights = {"checkpoint": None, "quant_checkpoint": None, "fresh_head": False}
        return {**asdict(self), **resolved, **weights}

    def difference(self, other: Card, evaluates_alike: bool = False) -> str | None:
        """The name of the first field in which two cards differ, or None where weights of one fit the other.

        Args:
            other: card to compare with.
            evaluates_alike: preprocessing must agree too, and class names where both cards have them.
        """
        names = ["arch", "model_args", "num_classes", "rules"]
        if evaluates_alike:
            names += ["preprocessing", *(["classes"] if self.classes and other.classes else [])]
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)


REPLACED_BY_A_CARD = frozenset(Card("", {}, 0, [], {}, []).options())  # names of options


def check_restored(content: Mapping[str, Any], card: Card, resumes: bool, averages: bool) -> None:
    """Raise QatError when a checkpoint cannot be restored into the model that ``card`` describes.

    Args:
        content: what the checkpoint holds.
        card: of the model that was built.
        resumes: training resumes from it; False for an evaluation.
        averages: the run has a weight average.
    """
    if resumes and AVERAGED in content and not averages:
        raise QatError(
            "the checkpoint was written with a weight average, and training would resume from the average instead of "
            "the weights: add the callback again (--config configs/add/average.yaml)"
        )
    if KEY not in content:
        raise QatError("the checkpoint was not written by `qat fit`: it does not describe its model")
    if (field := Card.from_dict(content[KEY], "the checkpoint").difference(card)) is not None:
        raise QatError(f"the checkpoint holds another model: {field} differs from the model that was built")


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
    """Load a checkpoint into ``model``, which ``card`` describes, and return what it says about its calibration.

    Raises:
        QatError: no such file, or its model or recipe differs.
    """
    option = "model.quant_checkpoint"
    theirs, content = read(path, f"--{option}")
    if (field := theirs.difference(card, evaluates_alike=True)) is not None:
        way_out = "calibrate with this config" if field == "rules" else "give the options that it was made with"
        raise QatError(f"{option}: {path} holds another model, {field} differs from this one: {way_out}")
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
