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


def last_checkpoint(runs: Path, name: str | None = None, trains: bool = False) -> Path:
    """The checkpoint of the newest run in ``runs``, or of one name.

    A folder without a config does not count: its command ended before it calibrated or trained.

    Args:
        runs: folder of all runs.
        name: of the runs that are meant; None for all.
        trains: training resumes from it, so it must be a last.ckpt; otherwise that of a calibration serves too.

    Raises:
        QatError: there is no run, or the newest one has no such checkpoint.
    """
    parent = runs if name is None else parent_of_runs(runs, name)
    depth = "*/*" if name is None else "*"
    folders = [path.parent for path in parent.glob(f"{depth}/{CONFIG}")]
    if not folders:
        raise QatError(f"--ckpt last: no run in {parent}; --runs says where runs are, --name which ones are meant")
    newest: Path = max(folders, key=_age)
    found = [newest / name for name in ((LAST,) if trains else (LAST, CALIBRATED)) if (newest / name).is_file()]
    if found:
        return found[0]
    raise QatError(f"--ckpt last: the newest run, {newest}, ended before its first {LAST}; {_way_out(newest)}")


def _way_out(folder: Path) -> str:
    """How to go on with a run that has no last.ckpt."""
    if any((folder / UNITS).glob("*.pt")):
        return f"it was calibrating: --resume {folder} in place of --ckpt goes on"
    if (folder / CALIBRATED).is_file():
        return f"its calibration is there: give {folder / CALIBRATED} as --model.quant_checkpoint"
    return "leave --ckpt out to start again, or give the checkpoint or the folder of an older run as --ckpt"


def unfinished_folder(resume: Path, runs: Path, name: str | None) -> Path:
    """The folder of a calibration that was killed.

    Args:
        resume: that folder, or the word ``last`` for the newest one.
        runs: folder of all runs.
        name: of the runs among which the newest is meant; None for all.

    Raises:
        QatError: the calibration has ended, or nothing in the folder is finished.
    """
    folder = resume
    if resume == NEWEST:
        parent = runs if name is None else parent_of_runs(runs, name)
        found = [path.parents[1] for path in parent.glob(f"{'*/*' if name is None else '*'}/{UNITS}/*.json")]
        ended = [path.parent for path in parent.glob(f"{'*/*' if name is None else '*'}/{CALIBRATED}")]
        folder = max(found or ended, key=_age) if found or ended else parent
    if any((folder / UNITS).glob("*.pt")):
        return folder
    if (folder / CALIBRATED).is_file():
        raise QatError(
            f"--resume: the calibration of {folder} has ended: give {folder / CALIBRATED} as --ckpt to qat validate, "
            "or as --model.quant_checkpoint to qat fit"
        )
    raise QatError(
        f"--resume: {folder} keeps nothing that a killed calibration could go on from; to start one, leave it out"
    )


def find_checkpoint(ckpt: Path, runs: Path, name: str | None, trains: bool = False) -> Path:
    """The file that ``--ckpt`` means.

    Args:
        ckpt: a file, the folder of a run, or the word ``last`` for the newest run.
        runs: folder of all runs.
        name: name of the runs among which the newest is meant; all when None.
        trains: training resumes from it.

    Raises:
        QatError: there is no such run, or its folder has no checkpoint.
    """
    if ckpt == NEWEST:
        return last_checkpoint(runs, name, trains)
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
