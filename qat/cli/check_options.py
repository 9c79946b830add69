"""What can be said about the options of a verb before any file is read: types, ranges, names, places to write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from qat.cli.check_paths import check_folder, check_name
from qat.cli.check_trainer import RANGES
from qat.cli.options import GROUPS, OF_ALL_VERBS, OF_ONE_VERB
from qat.cli.parse import Hints, hints_of, imports_of, instantiate, parse
from qat.errors import QatError
from qat.quantizers.named import plain
from qat.ranges import check_value

FILES = ("checkpoint", "teacher_checkpoint", "recipe")  # options of the model that are a word or the path of a file


def parse_options(
    parser: ArgumentParser, words: Sequence[str], verb: str, known: Iterable[str], trainer: Mapping[str, Any] = {}
) -> tuple[Any, Any]:
    """The options of a verb, complete with defaults, and only those that were given.

    Args:
        parser: reads them.
        words: the command line.
        verb: of which the options are.
        known: names of all options.
        trainer: annotations of the options of the trainer, where the verb has one.

    Raises:
        QatError: an option that does not exist, or whose value has the wrong type; for those of no group, a value out
            of its range. Groups and classes check themselves where they are built.
    """
    hints, known = option_hints(verb, trainer), list(known)
    found = [parse(parser, words, hints, known, **how) for how in ({}, {"defaults": False})]
    for config in (config.get(verb, config) for config in found):
        for name, option in (OF_ALL_VERBS | OF_ONE_VERB.get(verb, {})).items():
            if name in config and name != "base":
                check_value(f"--{name}", config[name], option.kind)
        model = config.get("model") or {}
        for name in FILES:
            if isinstance(value := model.get(name), str) and value.startswith("~"):
                model[name] = os.path.expanduser(value)
        if model.get("rules") is not None:
            model["rules"] = [plain(rule) for rule in model["rules"]]
            _check_quantizers(parser, model["rules"])
    return found[0], found[1]


def _check_uncalibrated(config: Any) -> None:
    """Raise QatError where the weights that `qat calibrate` would start from are those of a calibrated model."""
    for option, path in (("--ckpt", config.ckpt), ("--model.quant_checkpoint", config.model.quant_checkpoint)):
        if path is not None:
            raise QatError(
                f"{option} is {path}, a checkpoint of qat, and qat calibrate starts from float weights: give those as "
                "--model.checkpoint, or evaluate the checkpoint with `qat validate --ckpt`"
            )


def _check_quantizers(parser: ArgumentParser, rules: Sequence[Any]) -> None:
    """Raise QatError where the rules of a file name quantizers of other packages, which would be imported."""
    for rule in rules:
        spec = plain(rule.get("spec")) if isinstance(rule, Mapping) else None
        name = spec.get("class_path") if isinstance(spec, Mapping) else None
        if isinstance(name, str) and "." in name:
            imports_of(parser).check(name)


def option_hints(verb: str, trainer: Mapping[str, Any]) -> Hints:
    """Annotations of the options of a verb, by their dotted names."""
    own = {name: option.kind for name, option in (OF_ALL_VERBS | OF_ONE_VERB.get(verb, {})).items()}
    return hints_of({"": own, **GROUPS, "trainer": {**trainer, **RANGES}})


def check_constructors(parser: ArgumentParser, config: Any, options: Any) -> None:
    """Build everything that options name, once, before a file is read: constructors check their arguments.

    Args:
        parser: knows the classes.
        config: all that was parsed.
        options: the options of the verb, which are in ``config``.

    Raises:
        QatError: an argument out of its range, or one that a constructor refuses.
    """
    trainer = options.get("trainer")
    logger = getattr(trainer, "logger", None)
    if logger is not None:
        trainer.logger = None  # some begin an experiment as soon as they are built
    try:
        instantiate(parser, config)
    finally:
        if logger is not None:
            trainer.logger = logger


def check_options(verb: str, config: Any) -> None:
    """Check the name of a run, where a verb writes, and that what is to be calibrated is not calibrated already.

    Raises:
        QatError: a name that is none, a file that cannot be written, a checkpoint that is calibrated.
    """
    check_name(config.name)
    if config.model.trust:
        raise QatError("model.trust is true: on a command line it is --trust true, for all files together")
    if verb == "fit" and config.resume is not None and config.ckpt is not None:
        raise QatError(
            f"--resume is {config.resume}, and --ckpt is {config.ckpt}: one goes on with a calibration, the other with "
            "the training after it; leave one out"
        )
    if verb in ("validate", "calibrate"):
        check_folder("--results_file", config.results_file)
    if verb == "calibrate":
        _check_uncalibrated(config)
        if config.data.images is not None and config.data.held_out:
            raise QatError(
                f"data.held_out is {config.data.held_out}: it puts training images aside, and data.images calibrates "
                "on other ones; leave it out"
            )
    if verb == "predict":
        if config.output is None:
            raise QatError("qat predict writes a table: give --output predictions.csv")
        check_folder("--output", config.output)
