"""The options of the verbs that work on a model, for the parser of each and for its help; loads no Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from jsonargparse import ArgumentParser

from qat.data.options import DataOptions
from qat.ptq.options import CalibrationOptions
from qat.ranges import Range, Seed
from qat.training.options import ModelOptions

GROUPS = {"model": ModelOptions, "data": DataOptions, "calibration": CalibrationOptions}


class Option(NamedTuple):
    """An option that belongs to no group."""

    kind: Any
    default: Any
    help: str


OF_ALL_VERBS = {
    "base": Option(str | list[str] | None, None, "inside a config: configs, relative to it, that it starts from."),
    "seed_everything": Option(Seed, 0, "seed of weights, image order and crops."),
    "ckpt": Option(
        Path | None, None,
        "checkpoint that qat wrote: a file, the folder of a run, or the word last for the newest run. It describes its "
        "own model. qat fit resumes from it.",
    ),
    "name": Option(str | None, None, "name of the run; that of the first config, or the model's, when null."),
    "runs": Option(Path, Path("runs"), "runs go to RUNS/NAME/DATE."),
    "save_every": Option(Annotated[int, Range(1)], 500, "optimizer steps between two writes of last.ckpt."),
    "trust": Option(
        bool, False,
        "import classes that a checkpoint, a recipe or a config file names by a dotted path. That runs their code, so "
        "say true only for files that you trust.",
    ),
}  # fmt: skip
RESULTS_FILE = Option(
    Path | None, None,
    "JSON file to write: top1 and top5 in percent, loss, images, seconds, model, recipe, size_mb, and "
    "calibration, where there was one; products, where they were integer. A run that calibrates writes it to its "
    "folder in any case.",
)  # fmt: skip
RESUME = Option(
    Path | None, None,
    "go on with a calibration that was killed, after the last unit that it finished: its folder, or the word last for "
    "the newest one. Without a --config, its own is taken; the other options are the same as before.",
)  # fmt: skip
INTEGER = Option(
    bool, False,
    "compute every product with integers, as qat.integer does: the accuracy of a processor of integers. On a CPU.",
)  # fmt: skip
OF_ONE_VERB = {
    "fit": {"resume": RESUME},
    "validate": {"results_file": RESULTS_FILE, "integer": INTEGER},
    "calibrate": {
        "validate": Option(
            bool | None, None,
            "evaluate the calibrated model; when null, where there are validation images in data.root.",
        ),
        "results_file": RESULTS_FILE,
        "resume": RESUME,
    },
    "predict": {
        "output": Option(Path | None, None, "CSV file to write: path, then class and probability, best first.")
    },
    "describe": {"full": Option(bool, False, "one line per site, instead of one for all blocks.")},
}  # fmt: skip


def add_options(parser: ArgumentParser, verb: str) -> None:
    """All options of a verb but those of the trainer."""
    for name, option in (OF_ALL_VERBS | OF_ONE_VERB.get(verb, {})).items():
        parser.add_argument(f"--{name}", type=option.kind, default=option.default, help=option.help)
    for name, options in GROUPS.items():
        parser.add_class_arguments(options, name)


def plain_parser(verb: str, description: str) -> ArgumentParser:
    """A parser of all options of a verb, in which ``trainer`` is a table that is not looked into."""
    parser = ArgumentParser(
        prog=f"qat {verb}",
        usage=f"qat {verb} [options]",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file of options; later ones win. Repeatable.")
    add_options(parser, verb)
    return parser
