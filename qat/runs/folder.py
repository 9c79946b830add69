"""The folder of a run, RUNS/NAME/DATE, and which checkpoint ``--ckpt`` means."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from qat.errors import QatError

LAST = "last.ckpt"
CALIBRATED = "ptq.ckpt"
NEWEST = Path("last")  # the word that stands for the newest run
CONFIG = "config.yaml"
UNITS = "units"  # folder of what a calibration has finished, until it ends


def parent_of_runs(runs: Path, name: str) -> Path:
    """The folder RUNS/NAME of all runs of one name; QatError when the name would lead to another place."""
    if not name or Path(name).is_absolute() or {"..", "."} & set(name.replace("\\", "/").split("/")):
        raise QatError(f"--name is {name!r}: give the name of a folder below --runs, such as deit_t_w4a4")
    return runs / name


def fresh_folder(parent: Path) -> Path:
    """A new folder named by date and time; runs that start in the same second get a number."""
    date = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        try:
            (parent / (date + suffix)).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise QatError(f"--runs: cannot create {parent / date}: {error.strerror}") from None
        return parent / (date + suffix)
    raise QatError(f"--runs: {parent} has 99 runs that were started in this second")


def last_folder(runs: Path, name: str | None = None) -> Path:
    """The newest run in ``runs``, or of one name; QatError if there is none, or if it has no last.ckpt.

    A folder without a config does not count: its command ended before training started.
    """
    parent = runs if name is None else parent_of_runs(runs, name)
    depth = "*/*" if name is None else "*"
    folders = [path.parent for path in parent.glob(f"{depth}/{CONFIG}")]
    if not folders:
        raise QatError(f"--ckpt last: no run in {parent}; --runs says where runs are, --name which ones are meant")
    newest = max(folders, key=_age)
    if not (newest / LAST).is_file():
        raise QatError(
            f"--ckpt last: the newest run, {newest}, ended before its first {LAST}; leave --ckpt out to start again, "
            "or give the checkpoint or the folder of an older run as --ckpt"
        )
    return newest


def unfinished_folder(resume: Path, runs: Path, name: str) -> Path:
    """The folder of a calibration that was killed.

    Args:
        resume: that folder, or the word ``last`` for the newest one.
        runs: folder of all runs.
        name: of the runs among which the newest is meant.

    Raises:
        QatError: nothing in it is finished.
    """
    parent = parent_of_runs(runs, name)
    found = [path.parents[1] for path in parent.glob(f"*/{UNITS}/*.json")] if resume == NEWEST else [resume]
    folder = max(found, key=_age) if found else parent
    if not any((folder / UNITS).glob("*.pt")):
        raise QatError(
            f"--resume: {folder} keeps nothing that a killed calibration could go on from; to start one, leave it out"
        )
    return folder


def find_checkpoint(ckpt: Path, runs: Path, name: str | None) -> Path:
    """The file that ``--ckpt`` means.

    Args:
        ckpt: a file, the folder of a run, or the word ``last`` for the newest run.
        runs: folder of all runs.
        name: name of the runs among which the newest is meant; all when None.

    Raises:
        QatError: there is no such run, or its folder has no checkpoint.
    """
    if ckpt == NEWEST:
        return last_folder(runs, name) / LAST
    if not ckpt.is_dir():
        return ckpt
    for file in (ckpt / LAST, ckpt / CALIBRATED):
        if file.is_file():
            return file
    raise QatError(f"--ckpt: the folder {ckpt} has no {LAST} and no {CALIBRATED}: give that of a run, RUNS/NAME/DATE")


def names_a_run(ckpt: Path) -> bool:
    """Whether ``--ckpt`` names a run, which goes on in its folder, and not a file, from which a new run starts."""
    return ckpt == NEWEST or ckpt.is_dir()


def config_name(folder: Path) -> str:
    """config.yaml for the first start of a run, config_2.yaml when it is resumed, and so forth."""
    return next(name for name in _config_names() if not (folder / name).exists())


def newest_config(folder: Path) -> Path | None:
    """The config that the run in a folder was started or resumed with last."""
    found = None
    for name in _config_names():
        if not (folder / name).is_file():
            return found
        found = folder / name
    return found


def _config_names() -> Iterable[str]:
    return (CONFIG, *(f"config_{n}.yaml" for n in range(2, 10_000)))


def _age(folder: Path) -> tuple[str, int]:
    """What sorts runs by the time of their start: date and time, then the number of those in the same second."""
    date, _, number = folder.name.partition("_")
    time, _, suffix = number.rpartition("-") if number.count("-") == 3 else (number, "", "1")
    return f"{date}_{time}", int(suffix) if suffix.isdecimal() else 1
