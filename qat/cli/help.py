"""The help of the verbs that work on a model: what most people need, and with ``--help-all`` every option there is.

Types and ranges come from the annotations of the options, texts from their docstrings.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from qat.cli.options import GROUPS, OF_ALL_VERBS, OF_ONE_VERB, plain_parser
from qat.cli.wishes import wishes
from qat.ranges import Range

INDENT, WIDEST = 30, 100  # columns
METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT", Path: "PATH", dict: "{...}", list: "[...]"}
EXAMPLES = {
    "fit": (
        "qat fit --config configs/deit_t_w4a4.yaml --data.root DIR",
        "qat fit --ckpt last                    # resume the newest run",
    ),
    "validate": (
        "qat validate --ckpt last --data.root DIR",
        "qat validate --config configs/ptq/repq_vit.yaml --data.root DIR",
    ),
    "calibrate": (
        "qat calibrate --config configs/ptq/repq_vit.yaml --data.root DIR",
        "qat calibrate --config configs/ptq/repq_vit.yaml --data.images PHOTOS",
        "qat calibrate --resume last            # go on with one that was killed",
    ),
    "predict": ("qat predict --ckpt last --data.images PHOTOS --output predictions.csv",),
    "describe": ("qat describe --config configs/deit_t_w4a4.yaml", "qat describe --ckpt last --full true"),
}
MODEL = ("model.arch", "model.checkpoint", "model.recipe", "model.w_bits", "model.a_bits", "model.rules")
COMMON: dict[str, dict[str, tuple[str, ...]]] = {  # of each verb: title of a group -> its options
    "fit": {
        "files and folders": ("config", "ckpt", "data.root", "data.softlabels", "data.held_out", "name",
                              "runs"),
        "the model": (*MODEL, "model.fresh_head", "model.quant_checkpoint"),
        "training": ("data.global_batch_size", "data.batch_size", "data.crops_per_image", "data.crop_epochs",
                     "data.workers", "model.lr", "model.step_lr", "model.warmup_steps", "model.weight_decay",
                     "model.drop_path", "model.teacher", "model.regularizers", "calibration.method",
                     "calibration.images", "resume", "save_every", "seed_everything"),
    },
    "validate": {
        "files and folders": ("config", "ckpt", "data.root", "results_file", "integer", "data.val_batch_size",
                              "data.workers"),
        "a model that is calibrated first, without --ckpt": (*MODEL, "calibration.method", "calibration.images",
                                                             "seed_everything", "name", "runs"),
    },
    "calibrate": {
        "files and folders": ("config", "data.root", "data.images", "validate", "results_file", "name", "runs",
                              "data.val_batch_size", "data.workers"),
        "the model": MODEL,
        "calibration": ("calibration.method", "calibration.images", "calibration.batch_size", "calibration.seed",
                        "resume"),
    },
    "predict": {
        "files and folders": ("config", "ckpt", "data.images", "output", "data.val_batch_size", "data.workers"),
        "a model without --ckpt": (*MODEL, "data.root", "calibration.method", "calibration.images"),
    },
    "describe": {"what to show": ("config", "ckpt", "full", *MODEL, "model.model_args", "model.num_classes")},
}  # fmt: skip
TRAINER = {  # in our own words; of others the first sentence of Lightning is shown
    "trainer.devices": "processes of this machine, each on a device of its own; auto takes all GPUs, or one CPU",
    "trainer.num_nodes": "machines",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed; 32-true when null. Quantizers compute in float32 anyway",
    "trainer.max_steps": "optimizer steps after which training ends, and the length of its schedule; -1 sets no limit",
    "trainer.max_time": "DD:HH:MM:SS after which training stops; --ckpt last goes on",
    "trainer.float32_matmul_precision": "high multiplies float32 matrices on Tensor Cores, rounded to TensorFloat-32; "
    "null leaves torch as it is, which is highest",
    "trainer.accelerator": "cpu, gpu, mps, or auto",
    "trainer.strategy": "auto or ddp; strategies that shard parameters are refused",
    "trainer.logger": "loggers beside metrics.csv, which is always written: a class with its options, or a list",
    "trainer.callbacks": "a list of callbacks, each a class with its options, for example "
    "[{class_path: WeightAverage, init_args: {decay: 0.9999}}]",
    "trainer.max_epochs": "passes over the images; those that data.crop_epochs needs when null",
    "trainer.limit_train_batches": "batches of each pass that are trained on, as a number or a share; all when null",
    "trainer.limit_val_batches": "batches of the validation images, as a number or a share; all when null",
    "trainer.limit_predict_batches": "batches of predict, as a number or a share; all when null",
    "trainer.val_check_interval": "validate after so many batches, or after this share of a pass; at its end when null",
    "trainer.check_val_every_n_epoch": "passes between two validations",
    "trainer.log_every_n_steps": "optimizer steps between two lines of metrics.csv; 50 when null",
    "trainer.accumulate_grad_batches": "forward passes per optimizer step; if 1, data.global_batch_size sets it",
    "trainer.gradient_clip_val": "largest norm of the gradient; null does not clip",
    "trainer.enable_progress_bar": "false prints plain lines on a terminal too",
    "trainer.deterministic": "use deterministic algorithms only; false when null",
    "trainer.profiler": "simple, advanced or pytorch; nothing is measured when null",
}
SET_BY_QAT = {
    "barebones", "default_root_dir", "enable_autolog_hparams", "enable_checkpointing", "enable_model_summary",
    "fast_dev_run", "limit_test_batches", "model_registry", "num_sanity_val_steps", "overfit_batches",
    "reload_dataloaders_every_n_epochs", "use_distributed_sampler",
}  # fmt: skip
CONFIGS = """Every option can stand in a config too: --model.lr 1e-3 is
{{model: {{lr: 1.0e-3}}}} there. --print_config shows what a command would use.
A class, such as a method of calibration, has options of its own:
`qat {verb} --calibration.method.help RepQViT` lists them."""
OF_TRAINING = {
    *(f"model.{name}" for name in ("betas", "compile", "drop_path", "eps", "lr", "min_lr", "regularizers", "step_lr",
                                   "teacher", "teacher_checkpoint", "warmup_steps", "weight_decay")),
    *(f"data.{name}" for name in ("crop_epochs", "crop_ratio", "crop_scale", "crops_per_image", "flip",
                                  "global_batch_size", "softlabels", "softlabels_partial", "train_interpolation")),
    "save_every",
}  # fmt: skip
OF_THE_TRAINER = {
    "fit": tuple(TRAINER)[:6],
    "validate": ("trainer.devices", "trainer.precision"),
    "calibrate": ("trainer.accelerator", "trainer.precision"),
    "predict": ("trainer.precision",),
}


class Line(NamedTuple):
    """An option as the help shows it."""

    name: str
    metavar: str
    limits: tuple[str, ...]  # range, choices and default
    text: str

    def render(self, width: int) -> Iterator[str]:
        """The option, then its text, wrapped to ``width`` columns and indented."""
        head = f"  {'-c, ' if self.name == 'config' else ''}--{self.name} {self.metavar}".rstrip()
        limits = f" ({'; '.join(self.limits)})" if self.limits else ""
        words = self.text.replace("``", "").rstrip(".")
        text = textwrap.wrap(words + limits, width - INDENT)
        if len(head) >= INDENT:
            yield head
            head = ""
        for line in text:
            yield f"{head:{INDENT}}{line}"
            head = ""


def print_help(verb: str, summary: str, everything: bool) -> None:
    """Print the help of a verb, with the options of most interest or with all of them."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    lines = {line.name: line for line in _lines(plain_parser(verb, summary), _hints(verb))}
    groups: dict[str, Iterable[str]] = {**COMMON[verb], **(_others(verb, lines) if everything else {})}
    print(f"usage: qat {verb} [options]\n\n{summary[0].upper()}{summary[1:]}.\n")
    print("\n".join(f"  {example}" for example in EXAMPLES[verb]))
    if verb == "calibrate":
        print("\nwhich method for which wish:", *wishes(width), sep="\n")
    for title, names in groups.items():
        _print_group(title, (lines[name] for name in names), width)
    if verb in OF_THE_TRAINER:
        _print_group("the trainer", _trainer_lines(verb, everything), width)
    print(f"\n{CONFIGS.format(verb=verb)}")
    if not everything:
        print(f"`qat {verb} --help-all` lists every option.")


def _others(verb: str, lines: Iterable[str]) -> dict[str, list[str]]:
    """The options that are not in `COMMON`, by the title of their group; those of training alone only for qat fit."""
    hidden = {
        "help",
        "print_config",
        "model.trust",
        *GROUPS,
        *(name for names in COMMON[verb].values() for name in names),
    }
    if verb != "fit":
        hidden |= OF_TRAINING
    left = [name for name in lines if name not in hidden and not name.endswith(".help")]
    groups = {f"more of {group}": [name for name in left if name.startswith(f"{group}.")] for group in GROUPS}
    return groups | {"more": [name for name in left if "." not in name]}


def _print_group(title: str, lines: Iterable[Line], width: int) -> None:
    rendered = [row for line in lines for row in line.render(width)]
    if rendered:
        print(f"\n{title}:", *rendered, sep="\n")


def _hints(verb: str) -> dict[str, Any]:
    """The annotation of every option, by its dotted name."""
    found = {name: option.kind for name, option in (OF_ALL_VERBS | OF_ONE_VERB.get(verb, {})).items()}
    for group, options in GROUPS.items():
        found |= {f"{group}.{name}": hint for name, hint in get_type_hints(options, include_extras=True).items()}
    return found | {"config": Path}


def _lines(parser: ArgumentParser, hints: Mapping[str, Any]) -> Iterator[Line]:
    for action in parser._actions:
        hint = hints.get(action.dest, str)
        yield Line(action.dest, _metavar(hint), tuple(_limits(hint, action.default)), action.help or "")


def _trainer_lines(verb: str, everything: bool) -> Iterator[Line]:
    """The trainer's options; all of them need Lightning, which is loaded only then."""
    if not everything:
        return (Line(name, "VALUE", (), TRAINER[name]) for name in OF_THE_TRAINER[verb])
    from qat.cli.trainer import TRAINER_DEFAULTS, Trainer

    parser = ArgumentParser()
    parser.add_class_arguments(Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    hidden = {f"trainer.{name}" for name in SET_BY_QAT} | {"help", "trainer"}
    lines = (line for line in _lines(parser, {}) if line.name not in hidden and not line.name.endswith(".help"))
    return (line._replace(metavar="VALUE", text=TRAINER.get(line.name) or _first_sentence(line.text)) for line in lines)


def _first_sentence(text: str) -> str:
    """The first sentence of a text of Lightning, without the markup of Sphinx."""
    plain = re.sub(r":\w+:`~?([\w.]+\.)?(\w+)`", r"\2", text)
    return re.split(r"\.\s|\bDefaults?(?: to)?:", plain)[0].strip()


def _limits(hint: Any, default: Any) -> Iterator[str]:
    if ranges := [str(part) for part in _parts(hint) if isinstance(part, Range)]:
        yield ranges[0]
    if isinstance(default, bool):
        yield f"default {str(default).lower()}"
    elif default is not None and "SUPPRESS" not in str(default):
        yield f"default {list(default) if isinstance(default, tuple) else default}"


def _metavar(hint: Any) -> str:
    """A word for the value of an option."""
    for part in (hint, *_parts(hint)):
        if get_origin(part) is Literal:
            return "|".join(map(str, get_args(part)))
        if get_origin(part) is tuple:
            return f"[{', '.join('XYZ'[: len(get_args(part))])}]"
        if (get_origin(part) or part) in METAVARS:
            return METAVARS[get_origin(part) or part]
    return "CLASS"


def _parts(hint: Any) -> Iterator[Any]:
    """What an optional or annotated type is made of, from the outside in; inside a tuple or a list is not looked."""
    if get_origin(hint) in (Union, UnionType, Annotated):
        for part in get_args(hint):
            if part is not NoneType:
                yield part
                yield from _parts(part)
