"""A quantizer outside the package, which only an import can find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MODULE = """
from dataclasses import dataclass
from pathlib import Path
from qat.quantizers import LSQ

Path(__file__).with_name("imported").touch()


@dataclass(frozen=True)
class Mine(LSQ):
    pass
"""


def own_quantizer(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, bits: int) -> dict[str, Any]:
    """A spec of a quantizer like LSQ; importing its module leaves the file ``imported`` behind."""
    (folder / f"{module}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    return {"class_path": f"{module}.Mine", "init_args": {"bits": bits}}
