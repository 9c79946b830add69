"""What a command works with, settled before anything is built or downloaded: checkpoint, recipe, preprocessing, data.

Everything that can be wrong is looked at here; options are completed in place.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qat import checkpoint
from qat.cli.agreement import check_agreement
from qat.errors import QatError
from qat.models import default_preprocessing
from qat.models.arch import has_one_size
from qat.preprocessing import Preprocessing
from qat.recipe import build_recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """What is known before the work begins.

    Args:
        ckpt: checkpoint that the model comes from.
        calibrates: the quantizers are still to be filled.
        evaluates: a calibration is followed by an evaluation.
        run: what the checkpoint says of a run that resumes: its step, its options and the state of its data.
        replaced: options of the model, as they were before the card of the checkpoint took their place.
    """

    ckpt: Path | None
    calibrates: bool
    evaluates: bool
    run: Resumed | None
    replaced: dict[str, Any]


class Resumed(NamedTuple):
    """A run that resumes. Its checkpoint is not kept open, because the run will replace it."""

    step: int
    options: dict[str, str]
    data: dict[str, Any] | None  # None in a checkpoint of a run with another data module

    @classmethod
    def from_checkpoint(cls, content: Mapping[str, Any]) -> Resumed:
        """What a checkpoint says."""
        return cls(content["global_step"], content[checkpoint.KEY].get("options", {}), content.get(checkpoint.DATA))


def settle(verb: str, config: Any, given: Any, ckpt: Path | None) -> Settled:
    """Complete the options of a command, and check them against the checkpoint and the data.

    Args:
        verb: fit, validate, calibrate, predict or describe.
        config: all options, changed in place.
        given: only those that were given.
        ckpt: the checkpoint, once ``last`` is replaced by a file.

    Raises:
        QatError: for the first thing that is wrong.
    """
    model, data = config.model, config.data
    model.trust = bool(config.get("trust", False))
    run, replaced = (None, {}) if ckpt is None else _take_card(verb, config, given, ckpt)
    if model.arch is None:
        raise QatError("model.arch is not set: give the name of a timm model, a --config or a --ckpt")
    table = build_recipe(model.recipe, model.rules or [], model.w_bits, model.a_bits, model.trust)
    if verb == "calibrate" and not table:
        raise QatError(f"model.recipe is {model.recipe}, which quantizes nothing: give another, such as repq_vit")
    data.preprocessing = model.preprocessing = _preprocessing(model, data).to_dict()
    for part in (data, model):
        part.seed = config.seed_everything if part.seed is None else part.seed
    if model.quant_checkpoint is not None:
        replaced = {"rules": model.rules}
        model.rules = _with_chosen_rules(model)
    calibrates = bool(table) and ckpt is None and model.quant_checkpoint is None
    if given.get("calibration") and not calibrates and run is None:  # a run that resumes was calibrated by its config
        log.info("the model is calibrated already: calibration.* is not used")
    evaluates = verb != "describe" and _settle_data(verb, config, ckpt, calibrates)
    if verb != "fit":
        model.teacher = model.features = None
    elif model.features is not None and model.teacher is None:
        raise QatError("model.features needs a teacher that sees the same crops: give model.teacher")
    return Settled(ckpt, calibrates, evaluates, run, replaced)


def _take_card(verb: str, config: Any, given: Any, ckpt: Path) -> tuple[Resumed | None, dict[str, Any]]:
    """Let the card of a checkpoint replace the options that it says; the run that resumes, and what was replaced."""
    card, content = checkpoint.read(ckpt, trust=config.model.trust)
    resumes = verb == "fit"
    if resumes and "optimizer_states" not in content:
        raise QatError(
            f"{ckpt} holds weights only, no state of a run to resume: to start from them, give it as "
            "--model.quant_checkpoint, with the recipe that it was made with"
        )
    if verb != "describe":
        checkpoint.check_run(content, card, str(ckpt), resumes)
    check_agreement(card, ckpt, given, len(_chosen(content)))
    replaced = {name: config.model[name] for name in card.options()}
    for name, value in card.options().items():
        config.model[name] = value
    config.data.preprocessing = card.preprocessing
    return (Resumed.from_checkpoint(content) if resumes else None), replaced


def _with_chosen_rules(model: Any) -> list[Any] | None:
    """The user's rules, and after them those that the calibration of ``model.quant_checkpoint`` has added."""
    card, content = checkpoint.read(model.quant_checkpoint, "--model.quant_checkpoint", model.trust)
    count = len(_chosen(content))
    rules: list[Any] | None = [*(model.rules or []), *card.rules[-count:]] if count else model.rules
    return rules


def _chosen(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantizers that the calibration of a checkpoint has chosen, by site: the last rules of its card."""
    found = content[checkpoint.KEY].get("calibration", {}).get("chosen", {})
    return found if isinstance(found, Mapping) else {}


def _settle_data(verb: str, config: Any, ckpt: Path | None, calibrates: bool) -> bool:
    """Check the images that a command reads; return whether a calibration is followed by an evaluation."""
    from qat.data.check import check_data

    evaluates = verb != "calibrate" or _evaluates(config)
    check_data(verb, config.model, config.data, ckpt, calibrates, evaluates)
    if calibrates:
        _check_images(config.calibration.images, config.data, verb)
    return evaluates


def _evaluates(config: Any) -> bool:
    """Whether `qat calibrate` evaluates: as it is told, else where there are validation images."""
    from qat.data.classes import Tree

    if config.validate is not None:
        return bool(config.validate)
    return config.data.root is not None and Tree.of(config.data).has("val")


def _preprocessing(model: Any, data: Any) -> Preprocessing:
    """That of the model, with what the options state; QatError for a size that the model does not take."""
    default = default_preprocessing(model.arch, model.model_args)
    stated = default.override({**(model.preprocessing or {}), **(data.preprocessing or {})})
    if stated.size != default.size and has_one_size(model.arch, model.model_args):
        raise QatError(
            f"data.preprocessing.size is {stated.size}, but {model.arch} takes {default.size} pixels: give "
            f"--model.model_args.img_size {stated.size} in its place"
        )
    return stated


def _check_images(wanted: int, data: Any, verb: str) -> None:
    """Raise QatError where a calibration needs more images than there are."""
    from qat.data.classes import Tree
    from qat.data.splits import loose_source

    loose = verb == "calibrate" and data.images is not None
    source = loose_source(Path(data.images)) if loose else Tree.of(data).source("train")
    if wanted > len(source):
        raise QatError(f"calibration.images is {wanted}: {source.place} has {len(source)}, choose 1..{len(source)}")
