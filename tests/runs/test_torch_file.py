"""A file of torch is complete or not there, and a full disk is one line."""

from __future__ import annotations

import resource

import pytest
import torch

from qat.errors import QatError
from qat.runs.torch_file import save_replacing


def test_a_disk_that_is_full_leaves_the_old_file_and_is_named(tmp_path):
    path = tmp_path / "unit.pt"
    save_replacing({"a": torch.ones(3)}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(QatError, match=r"cannot write .*unit\.pt: File too large"):
            save_replacing({"a": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    assert [part.name for part in tmp_path.iterdir()] == ["unit.pt"]
