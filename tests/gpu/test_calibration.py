"""Calibration on a GPU."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from qat import build_recipe, quantize
from qat.cli.main import run
from qat.ptq import InitSteps, Observe, OutputSearch, PTQMethod, RepQViT, site_errors
from qat.sites.insert import quantizers
from tests.gpu.conftest import all_on_gpu_last_on_cpu, on
from tests.gpu.models import float_model, pixels

RANGES = [Observe("minmax"), Observe("ema")]
SEARCHES = [InitSteps(), Observe("percentile"), Observe("omse"), OutputSearch(), RepQViT()]


@all_on_gpu_last_on_cpu("method", [*RANGES, *SEARCHES])
def test_every_method_works_on_the_device_and_finds_what_it_finds_on_a_cpu(method: PTQMethod, device):
    """Where a range is searched for, candidates with almost the same error may change places between devices."""
    recipe = "repq_vit" if isinstance(method, RepQViT) else "uniform"
    here = quantize(float_model(), build_recipe(recipe, w_bits=8, a_bits=8))
    there = copy.deepcopy(here).to(device)
    method(here, [pixels(seed=seed) for seed in (0, 1)])
    method(there, [pixels(seed=seed).to(device) for seed in (0, 1)])
    tolerance = 1e-4 if method in RANGES else 0.05
    close = []
    for (name, mine), (_, theirs) in zip(quantizers(here), quantizers(there), strict=True):
        assert theirs.calibrated, name
        assert all(value.device.type == device.type for value in (*theirs.parameters(), *theirs.buffers())), name
        close.append(torch.allclose(theirs.step.cpu(), mine.step, rtol=tolerance, atol=0))
    assert sum(close) >= (len(close) if method in RANGES else 0.9 * len(close))
    errors = site_errors(there, [pixels(seed=2).to(device)])  # signal to noise, dB
    assert errors.keys() == dict(quantizers(there)).keys()
    assert min(errors.values()) > 10


def test_a_calibrated_checkpoint_evaluates_alike_on_both_devices(config, images, device, tmp_path):
    words = ["validate", "--config", str(config), "--calibration.method", "Observe", "--model.recipe", "uniform"]
    run([*words, *on(device), "--runs", str(tmp_path)])
    (folder,) = (path.parent for path in tmp_path.glob("*/*/ptq.ckpt"))
    there = json.loads((folder / "results.json").read_text())
    words = ["validate", "--ckpt", str(folder / "ptq.ckpt"), "--data.root", str(images), "--data.workers", "0"]
    run([*words, *on(torch.device("cpu")), "--results_file", str(tmp_path / "cpu.json")])
    here = json.loads((tmp_path / "cpu.json").read_text())
    assert there["images"] == here["images"] == 12
    assert there["loss"] == pytest.approx(here["loss"], rel=0.02)
