"""Reconstruction of units on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qat import build_recipe, quantize
from qat.ptq import Reconstruct, Steps, TensorSearch
from qat.ptq.cache import Cache
from qat.ptq.reconstruction.adaround import AdaRound
from qat.ptq.reconstruction.learned_weights import WeightRule
from qat.ptq.reconstruction.low_rank import LowRank
from qat.ptq.reconstruction.straight_through import StraightThrough
from qat.ptq.reconstruction.training import Training
from tests.gpu.conftest import all_on_gpu_last_on_cpu
from tests.gpu.models import float_model, pixels

RULES: list[WeightRule] = [AdaRound(lr=1e-2), LowRank(rank=4), StraightThrough(lr=1e-3)]


def reconstructed(
    device: torch.device, rule: WeightRule | None, cache: Cache | None = None, **options: Any
) -> torch.Tensor:
    """Logits of the model that a short reconstruction leaves; without a rule, of what it starts from."""
    model = quantize(float_model(), build_recipe("frontier", w_bits=3, a_bits=4)).to(device)
    short = {"iterations": 12, "batch": 4, "step_lr": 1e-3, "log_steps": True}
    steps = [Reconstruct(weights=copy.deepcopy(rule), **short, **options)] if rule else []
    method = Steps([TensorSearch(), *steps])
    method.cache = cache
    method(model, [pixels(seed=seed).to(device) for seed in (0, 1)])
    with torch.no_grad():
        return model(pixels(seed=2).to(device))


@all_on_gpu_last_on_cpu("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_it_is_repeated_exactly_and_changes_the_model(rule: WeightRule, device: torch.device) -> None:
    options: dict[str, Any] = {"keep": 0.5, "input": "mixed"}
    first, second = (reconstructed(device, rule, **options) for _ in range(2))
    assert torch.equal(first, second)
    assert bool(first.isfinite().all())
    assert not torch.equal(first, reconstructed(device, None))


@pytest.mark.parametrize("autocast", [False, True])
def test_no_iteration_makes_the_host_wait(autocast: bool, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first one, which finds kernels."""
    iterate, count = Training.iterate, iter(range(10_000))

    def strict(self: Training, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if next(count) % 12 else "default")
        try:
            iterate(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Training, "iterate", strict)
    assert bool(reconstructed(gpu, AdaRound(), keep=0.5, input="mixed", autocast=autocast).isfinite().all())
    assert next(count) == 12 * 4, "four units"


def test_what_the_host_keeps_gives_what_the_device_keeps(gpu: torch.device) -> None:
    there = reconstructed(gpu, StraightThrough(lr=1e-3))
    assert torch.equal(there, reconstructed(gpu, StraightThrough(lr=1e-3), Cache(gigabytes=0.0)))
