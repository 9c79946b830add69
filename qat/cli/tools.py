"""Verbs without a model to train: their options come from a dataclass, and their work is a function of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from jsonargparse import ArgumentParser

from qat.cli.configs import check_configs
from qat.cli.log import quiet_libraries
from qat.cli.parse import hints_of, instantiate, parse
from qat.errors import QatError, first_line

LABELS = """Let a teacher label many crops of every training image, into one HDF5 file that qat fit trains on. A run
that was stopped or killed resumes when it is started again with the same options. Example:
qat make-softlabels --data.root DIR --teacher regnety_160.deit_in1k --crops 500 --out labels.h5"""
FKD = """Make a store of soft labels from the label files of FKD, one for each training image: LABELS holds
imagenet/train/<class>/<image>.tar, train/<class>/<image>.tar or <class>/<image>.tar. Example:
qat import-fkd LABELS --data.root DIR --teacher NAME --label_type marginal_smoothing_k5 --out labels.h5"""
OFFICIAL = """Turn an official DeiT, Swin, SReT or VVTQ checkpoint into a file that qat reads. Float weights become a
.safetensors file for --model.checkpoint, a quantized model of VVTQ a .ckpt file that describes itself. What does not
fit exactly is refused, and nothing is written."""
EXPORT = """Write a quantized checkpoint with its weights packed as integers of their own width. The file describes
itself: qat validate, qat predict and qat.load read it, and their logits are those of the checkpoint, to the bit. It is
read again and compared before it gets its name. Example:
qat export --ckpt last --output deit_t_w4a4.safetensors"""


class Tool(NamedTuple):
    """What a verb does.

    Args:
        options: dataclass of what can be given; its docstring is the help.
        work: what is done with them.
        description: for the help.
        positional: paths that are given without a name, and their help.
    """

    options: Callable[..., Any]
    work: Callable[[Any], None]
    description: str
    positional: dict[str, str]


def run(verb: str, arguments: Sequence[str]) -> None:
    """Do the work of a verb with the options of a command line, or of YAML files that it names.

    Raises:
        QatError: bad input, or a disk that is full; what is finished is kept.
    """
    tool = _find(verb)
    quiet_libraries()
    parser = ArgumentParser(
        prog=f"qat {verb}",
        usage=" ".join([f"qat {verb}", *map(str.upper, tool.positional), "[options]"]),
        description=tool.description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file of options; later options win.")
    arguments = ["--help" if word == "--help-all" else word for word in arguments]  # it has no more to say
    for word, text in tool.positional.items():
        parser.add_argument(word, metavar=word.upper(), type=Path, help=text)
    parser.add_class_arguments(tool.options, as_group=False, skip=set(tool.positional))
    check_configs(arguments)
    hints = get_type_hints(tool.options, include_extras=True)
    groups = {"": hints} | {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    known = [action.dest for action in parser._actions]
    values = instantiate(parser, parse(parser, arguments, hints_of(groups), known))
    options = tool.options(**{key: value for key, value in values.items() if key != "config"})
    try:
        tool.work(options)
    except OSError as error:  # a full disk, above all
        raise QatError(f"{first_line(error)}; what is finished is kept") from None


def _find(verb: str) -> Tool:
    """The tool of a verb; only what it needs is imported."""
    match verb:
        case "make-softlabels":
            from qat.labeling import make, plan

            return Tool(plan.Options, make.make_softlabels, LABELS, {})
        case "import-fkd":
            from qat.labeling import import_fkd

            places = {"labels": "folder of the label files"}
            return Tool(import_fkd.Options, import_fkd.import_fkd, FKD, places)
        case "convert-official":
            from qat.official import files

            places = {"input": "official .pth or .pth.tar file", "output": ".safetensors, or .ckpt for a quantized one"}
            return Tool(files.ConvertOptions, files.convert_file, OFFICIAL, places)
        case "export":
            from qat.export import export, options

            return Tool(options.ExportOptions, export.export, EXPORT, {})
        case _:
            raise AssertionError(f"{verb} is no tool")
