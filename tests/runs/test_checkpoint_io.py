"""Checkpoints that replace the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qat.runs.checkpoint_io import AtomicCheckpoints


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("the process dies here")


def test_a_checkpoint_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    io, path = AtomicCheckpoints(), tmp_path / "sub" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(RuntimeError):
        io.save_checkpoint({"step": 2, "bad": Unpicklable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    io.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
