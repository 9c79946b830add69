"""What a command takes from the run whose checkpoint it is given: to resume, its config; else where its images are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qat.cli.words import given_configs, last_value
from qat.data.splits import HUB
from qat.errors import UNREADABLE, QatError
from qat.runs.folder import find_checkpoint, names_a_run, newest_config, unfinished_folder

PLACES = ("root", "class_map", "val_labels")  # options of ``data`` that are paths
NUMBERS = ("workers", "val_batch_size")


class Origin(NamedTuple):
    """The run that a command goes on with, or whose model it looks at.

    Args:
        ckpt: file of ``--ckpt``; None without one.
        goes_on: the run goes on in its own folder.
        config: newest config of the run that the checkpoint is from; None where there is none beside it.
        resumed: folder of a calibration that was killed and goes on; None for none.
    """

    ckpt: Path | None
    goes_on: bool
    config: Path | None
    resumed: Path | None = None

    def arguments(self, verb: str, given: Sequence[str]) -> list[str]:
        """The words of a command, preceded by what it takes from the run; later words win.

        Raises:
            QatError: the command resumes a checkpoint without a config, neither given nor beside it.
        """
        if self.resumed is not None and self.config is not None and not given_configs(given):
            return ["--config", str(self.config), *given]
        if verb == "fit" and self.ckpt is not None and not given_configs(given):
            if self.config is None:
                raise QatError(
                    "qat fit --ckpt resumes a run: give its --config too, for the data, teacher and schedule; the "
                    f"folder of {self.ckpt} has none"
                )
            return ["--config", str(self.config), *given]
        if verb in ("validate", "predict") and self.config is not None:
            return [*_places(self.config), *given]
        return list(given)


def find_origin(verb: str, given: Sequence[str]) -> Origin:
    """Find the checkpoint and the run that a command line names, before it is parsed.

    Raises:
        QatError: there is no such run.
    """
    ckpt, resume, runs, name = (last_value(given, f"--{option}") for option in ("ckpt", "resume", "runs", "name"))
    named, folder = run_name(name, given_configs(given)), Path(runs or "runs").expanduser()
    if resume not in ("", "null"):
        resumed = unfinished_folder(Path(resume).expanduser(), folder, named)
        return Origin(None, False, newest_config(resumed), resumed)
    if ckpt in ("", "null"):
        return Origin(None, False, None)
    return origin_of(verb, Path(ckpt).expanduser(), folder, named)


def run_name(name: str | None, configs: Sequence[str]) -> str | None:
    """The name of a run: the one that is given, or that of its first config; None without either."""
    return name or (Path(configs[0]).stem if configs else None)


def origin_of(verb: str, ckpt: Path, runs: Path, name: str | None) -> Origin:
    """The run that a ``--ckpt`` names; the arguments are those of `find_checkpoint`."""
    file = find_checkpoint(ckpt, runs, name, trains=verb == "fit")
    return Origin(file, verb == "fit" and names_a_run(ckpt), newest_config(file.parent))


def _places(config: Path) -> list[str]:
    """Options that say where the images of a run are, as words of a command line.

    Only those that can be used here: the file may be from another machine, and nothing is downloaded for it.
    """
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, *UNREADABLE):
        return []  # the checkpoint alone is enough
    data: Any = content.get("data") if isinstance(content, dict) else None
    known = data if isinstance(data, dict) else {}
    found = {name: known.get(name) for name in (*PLACES, *NUMBERS, "classes")}
    usable = {name: value for name, value in found.items() if _is_usable(name, value)}
    return [f"--data.{name}={value}" for name, value in usable.items()]


def _is_usable(name: str, value: Any) -> bool:
    """Whether an option from a config beside a checkpoint can be used on this machine."""
    if name in NUMBERS:
        return type(value) is int and value >= (name != "workers")
    if name == "classes":
        return value in ("auto", "folders")
    try:
        path = Path(str(value)).expanduser()
        return isinstance(value, str) and path.parts[:1] != (HUB,) and path.exists()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, with a zero byte, or of an unknown user
        return False
