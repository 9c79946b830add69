"""The options of the verbs that work on a model, for the parser of each and for its help; loads no Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from qat.data.options import DataOptions
from qat.ptq.options import CalibrationOptions
from qat.training.options import ModelOptions

TRAINER = """
trainer.*: every argument of Lightning's Trainer, for example --trainer.devices 2 or --trainer.precision bf16-mixed.
`qat {verb} --trainer.help` lists them."""


def add_options(parser: ArgumentParser, verb: str) -> None:
    """All options of a verb but those of the trainer."""
    parser.add_argument("--base", type=str | list[str] | None, default=None,
                        help="Inside a config: configs, relative to it, that it starts from.")  # fmt: skip
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, image order and crops.")
    ckpt = "Checkpoint that qat wrote; it describes its own model."
    if verb == "fit":
        ckpt = "Checkpoint to resume from, with its --config: a file, or last for the newest run of NAME."
    parser.add_argument("--ckpt", type=Path | None, default=None, help=ckpt)
    parser.add_argument("--name", type=str | None, default=None, help="Name of the run; the first config's when null.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Runs go to RUNS/NAME/DATE.")
    save = "Optimizer steps of qat fit between two writes of last.ckpt."
    parser.add_argument("--save_every", type=int, default=500, help=save)
    for name, (kind, default, text) in OWN.get(verb, {}).items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_class_arguments(ModelOptions, "model")
    parser.add_class_arguments(DataOptions, "data")
    parser.add_class_arguments(CalibrationOptions, "calibration")


OWN: dict[str, dict[str, tuple[Any, Any, str]]] = {  # of a single verb: name -> type, default, help
    "validate": {
        "results_file": (
            Path | None,
            None,
            "JSON file to write: top1 and top5 in percent, loss, images, seconds, model, recipe, size_mb, and "
            "calibration, where there was one. A run that calibrates writes it to its folder in any case.",
        )
    },
    "predict": {
        "output": (Path | None, None, "CSV file to write: path, then class and probability, most probable first.")
    },
    "describe": {"full": (bool, False, "One line per site, instead of one for all blocks.")},
}


def print_help(verb: str, summary: str) -> None:
    """The help of a verb that trains or evaluates."""
    plain_parser(verb, f"{summary[0].upper()}{summary[1:]}.").print_help()


def plain_parser(verb: str, description: str) -> ArgumentParser:
    """A parser of all options of a verb, in which ``trainer`` is a table that is not looked into."""
    parser = ArgumentParser(
        prog=f"qat {verb}",
        usage=f"qat {verb} [options]",
        description=description,
        epilog=TRAINER.format(verb=verb) if verb != "describe" else None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file of options; later ones win. Repeatable.")
    add_options(parser, verb)
    return parser
