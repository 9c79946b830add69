"""Losses that are not finite stop a run and name the place."""

from __future__ import annotations

import pytest
import torch

from qat.errors import QatError
from qat.training.finite import FiniteCheck


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_names_the_place_and_the_way_out(value: str) -> None:
    check = FiniteCheck()
    check.check(torch.tensor(1.0), "step 6")
    with pytest.raises(QatError, match=rf"loss is {value} at step 7 .*model\.lr"):
        check.check(torch.tensor(float(value)), "step 7 (epoch 0)")
