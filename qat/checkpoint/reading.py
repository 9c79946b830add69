"""The one reader of checkpoints, which every verb and `qat.load` use: file, card, weights, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from torch import nn

from qat.checkpoint.card import Card
from qat.checkpoint.content import AVERAGED, KEY, check_content, check_weights, model_weights
from qat.checkpoint.packed import SUFFIX, is_packed, read_packed
from qat.errors import QatError
from qat.models.torch_file import read_plain, reason
from qat.ranges import shown


def read(path: str | Path, option: str = "--ckpt", trust: bool = False) -> tuple[Card, dict[str, Any]]:
    """The card and the whole content of a checkpoint, once all of it is known to be usable.

    Args:
        path: a file that qat wrote.
        option: what the errors call the option that names it.
        trust: quantizers that its card names by a dotted path may be imported.

    Raises:
        QatError: the file is missing, damaged or not one of ours, its card is malformed, or its weights do not fit.
    """
    content = _read_file(Path(path), option, trust)
    card = Card.from_dict(content[KEY], str(path), trust)
    check_content(content, card, str(path))
    return card, content


def find_card(path: str | Path, trust: bool = False) -> Card | None:
    """The card of a file, or None if it is no checkpoint of ours; QatError for one of ours that cannot be used."""
    path = Path(path)
    if not (path.suffix.lower() == ".ckpt" and path.is_file()) and not is_packed(path):
        return None
    try:
        content = _read_file(path, "--ckpt", trust)
    except QatError:
        if is_packed(path):  # it says that it is one of ours
            raise
        return None
    return Card.from_dict(content[KEY], str(path), trust)


def load(path: str | Path, trust: bool = False) -> nn.Module:
    """The quantized model of a checkpoint, in evaluation mode, on the CPU, from this one file alone.

    Args:
        path: a file that qat wrote.
        trust: quantizers that it names by a dotted path may be imported, which runs their code.

    Raises:
        QatError: as `read`.
    """
    card, content = read(path, trust=trust)
    model = card.build()
    model.load_state_dict(model_weights(content, str(path)), strict=True)
    return model.eval()


def load_into(model: nn.Module, card: Card, path: str | Path, trust: bool = False) -> dict[str, Any]:
    """Load a checkpoint into ``model``, which ``card`` describes, and return what it says about its calibration.

    Raises:
        QatError: as `read`, or the model or recipe of the checkpoint differs.
    """
    option = "model.quant_checkpoint"
    theirs, content = read(path, f"--{option}", trust)
    if (field := theirs.difference(card, evaluates_alike=True)) is not None:
        raise QatError(f"{option}: {path} holds another model, {_difference(field, theirs, card)}")
    model.load_state_dict(model_weights(content, str(path)), strict=True)
    calibration: dict[str, Any] = content[KEY].get("calibration", {})
    return calibration


def check_restored(content: Mapping[str, Any], card: Card, model: nn.Module, resumes: bool, averages: bool) -> None:
    """Raise QatError when a checkpoint cannot be restored into ``model``, which ``card`` describes.

    Args:
        content: what the checkpoint holds.
        card: of the model that was built.
        model: the model that was built.
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
    check_weights(model, model_weights(content, "the checkpoint"), "the checkpoint")


def _difference(field: str, theirs: Card, ours: Card) -> str:
    """What a checkpoint has, what is asked for, and what to do."""
    if field == "rules" and (found := theirs.other_site(ours)) is not None:
        site, stored, asked = found
        return (
            f"with {stored or 'floating point'} at {site!r}, and here it is {asked or 'floating point'}: give the bits "
            "and the recipe that it was made with, or calibrate with this config"
        )
    if field in ("arch", "num_classes", "model_args"):
        there, here = shown(getattr(theirs, field)), shown(getattr(ours, field))
        return f"{field} is {there} there and {here} here: give the options that it was made with"
    return f"{field} differs from this one: {_way_out(field, theirs, ours)}"


def _way_out(field: str, theirs: Card, ours: Card) -> str:
    """What to do where a field of two cards differs; the stored values of the preprocessing are named."""
    if field == "classes" and sorted(theirs.classes) == sorted(ours.classes):
        first = ", ".join(theirs.classes[:4])
        return (
            f"their order is {shown(first)}, ...: give it as --data.class_map FILE, a name per line, or calibrate again"
        )
    if field != "preprocessing":
        return "give the options that it was made with"
    stored = theirs.preprocessing
    different = [name for name in stored if stored[name] != ours.preprocessing.get(name)]
    options = [f"--data.preprocessing.{name} {str(stored[name]).replace(' ', '')}" for name in different]
    return f"it was made with {' '.join(options)}: give that, or calibrate with this config"


def _read_file(path: Path, option: str, trust: bool) -> dict[str, Any]:
    """What a file holds, tensors on the disk; QatError if it is missing, damaged or not one of ours."""
    if not path.is_file():
        raise QatError(
            f"no checkpoint {path}: {option} takes a file that qat wrote, such as runs/NAME/DATE/last.ckpt or ptq.ckpt"
        )
    if path.suffix.lower() == SUFFIX:
        return read_packed(path, trust)
    if not is_zipfile(path):
        what = "is empty" if not path.stat().st_size else "is no file that torch has saved"
        raise QatError(
            f"{path} {what}: {option} takes a checkpoint of qat, such as runs/NAME/DATE/last.ckpt or ptq.ckpt"
        )
    try:
        content = read_plain(path, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise QatError(f"cannot read the checkpoint {path}: {reason(error)}") from None
    if not isinstance(content, dict) or KEY not in content:
        raise QatError(
            f"{path} does not describe a quantized model, so it was not written by qat; "
            "float weights are given as --model.checkpoint FILE"
        )
    return content
