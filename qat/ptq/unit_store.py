"""The units that a calibration has finished, in a folder: one that was killed goes on after the last of them.

A file for each unit has its tensors as they were after rewrites, from which the float outputs are computed again, and
as they are in the end; and beside them one file with the state of a long step on the unit that is under way. Everything
that is computed again gives the same bits, so that a calibration that was interrupted ends with the same bits too.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.unit_work import UnitWork
from qat.quantizers.named import spec_from_dict
from qat.runs.torch_file import save_replacing
from qat.runs.writing import remove_parts, replacing
from qat.sites.family import Unit

WHAT, STATE, UNIT = "calibration.json", "state_*.pt", "unit_*.pt"


class UnitStore:
    """Finished units, and the state of the one that is under way.

    Args:
        folder: is made when the first file is written.
        what: tells the calibration: method, images, seed and model, as plain data.

    Attributes:
        seconds_before: that earlier processes took for the units that were restored.

    Raises:
        QatError: the folder is that of another calibration.
    """

    def __init__(self, folder: Path, what: dict[str, Any]) -> None:
        self.folder, self.what = folder, json.loads(json.dumps(what))
        self.seconds_before, self._started = 0.0, time.monotonic()
        self._rewritten: dict[str, Tensor] = {}
        remove_parts(folder)
        found = self._found()
        if found is None and self.count():
            raise QatError(f"{folder / WHAT} is missing or damaged, and tells what the units are of: remove {folder}")
        if found is not None and found != self.what:
            key = next((key for key in self.what if found.get(key) != self.what[key]), "format")
            raise QatError(
                f"{folder} is of another calibration: its {key} {'are' if key.endswith('s') else 'is'} "
                f"{different(found.get(key), self.what.get(key))}; give the same options, or start a new one"
            )

    def _found(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads((self.folder / WHAT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content

    def begin(self, here: UnitWork) -> None:
        """Remember the tensors of a unit that has been rewritten and not changed otherwise."""
        self._rewritten = {name: value.detach().cpu().clone() for name, value in tensors_of(here).items()}

    def has(self, unit: int) -> bool:
        """Whether a unit, by its number, is finished."""
        return self._file(unit).is_file()

    def save(self, here: UnitWork) -> None:
        """Keep a finished unit."""
        method = here.work.method
        content = {
            "rewritten": self._rewritten,
            "tensors": {name: value.detach().cpu() for name, value in tensors_of(here).items()},
            "chosen": dict(method.chosen),
            "report": dict(method.report),
            "seconds": self._seconds(),
        }
        self._write(self._file(here.index), content)
        for state in self.folder.glob(STATE):
            state.unlink()

    def restore(self, here: UnitWork) -> None:
        """Put a finished unit in place of what the float model has there; its float outputs come first."""
        content = self._read(self._file(here.index))
        self.seconds_before = content.get("seconds", 0.0)
        copy(content["rewritten"], here)
        here.remember()
        for site, spec in content["chosen"].items():
            if site in here.work.wanted and spec is None:
                here.leave_float(site)
            elif site in here.work.wanted and here.work.method.chosen.get(site) != spec:
                here.replace(site, spec_from_dict(spec).build(here.work.wanted[site].layout))
        here.work.method.report.update(content["report"])
        copy(content["tensors"], here)
        here.work.reached.update(here.wanted_activations())

    def save_state(self, key: str, state: dict[str, Any]) -> None:
        """Keep the state of a training of the unit that is under way; a key begins with its number and a space."""
        self._write(self._state_file(key), {"key": key, "state": state, "seconds": self._seconds()})

    def state(self, key: str) -> dict[str, Any] | None:
        """The state of a step, if it is the one that was under way."""
        if not self._state_file(key).is_file():
            return None
        content = self._read(self._state_file(key))
        found: dict[str, Any] = content["state"]
        if content["key"] != key:
            return None
        self.seconds_before = max(self.seconds_before, content["seconds"] - (time.monotonic() - self._started))
        return found

    def _seconds(self) -> float:
        """That the calibration has taken so far, in all processes."""
        return self.seconds_before + time.monotonic() - self._started

    def count(self) -> int:
        """How many units are finished."""
        return len(list(self.folder.glob(UNIT)))

    @property
    def kept(self) -> str:
        """What a calibration would go on from, in words; empty where nothing is kept."""
        parts = [f"{n} finished units" if (n := self.count()) != 1 else "1 finished unit"] if self.count() else []
        if any(self.folder.glob(STATE)):
            parts.append("a unit that is under way")
        return " and ".join(parts)

    def _state_file(self, key: str) -> Path:
        return self.folder / f"state_{key.partition(' ')[0]}.pt"

    def _file(self, unit: int) -> Path:
        return self.folder / f"unit_{unit:03d}.pt"

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        if self._found() is None:
            with replacing(self.folder / WHAT) as file:
                json.dump(self.what, file)
        save_replacing(content, path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no common base for what a damaged file raises
            raise QatError(f"{path} cannot be read ({type(error).__name__}): remove it to do its unit again") from None
        return content


def different(then: Any, now: Any) -> str:
    """Two values, and of long ones, such as a method with its options, the parts in which they differ."""
    if re.fullmatch(r"[0-9a-f]{64}", str(then)):
        return "another one"  # of a hash there is no more to say
    parts = [re.split(r", (?=\w+=)", str(value)) for value in (then, now)]
    if len(parts[0]) > 1 and len(parts[0]) == len(parts[1]):
        pairs = [(mine, theirs) for mine, theirs in zip(*parts, strict=True) if mine != theirs]
        then, now = (", ".join(part.rstrip(")") for part in side) for side in zip(*pairs, strict=True))
    return f"{then}, and here {now}"


def remove_units(folder: Path) -> None:
    """Remove what a store has written to a folder, and the folder: the calibration has come to its end."""
    remove_parts(folder)
    for path in (*folder.glob(UNIT), *folder.glob(STATE), folder / WHAT):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def tensors_of(here: UnitWork) -> dict[str, Tensor]:
    """Parameters and buffers of a unit, by name."""
    return {name: value for name, value in here.model.state_dict(keep_vars=True).items() if is_inside(name, here.unit)}


def is_inside(name: str, unit: Unit) -> bool:
    """Whether a tensor belongs to a unit."""
    return name in unit.parameters or any(name == own or name.startswith(f"{own}.") for own in unit.modules)


@torch.no_grad()
def copy(values: dict[str, Tensor], here: UnitWork) -> None:
    """Give tensors of a unit values, by name."""
    now = tensors_of(here)
    for name, value in values.items():
        now[name].copy_(value)
