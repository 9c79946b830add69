"""Evaluation on a GPU: the integers of FQ-ViT, no waits, and bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qat import build_recipe, quantize
from qat.cli.main import run
from qat.ptq import Observe
from qat.sites.hooks import watching
from qat.sites.insert import quantizers
from tests.gpu.callbacks import set_wait_mode
from tests.gpu.conftest import all_on_gpu_last_on_cpu, on
from tests.gpu.models import float_model, pixels, quantized

RECIPES = ("fq_vit_888", "fq_vit_884_released", "fq_vit_884")


def moved(values: Any, device: torch.device) -> Any:
    """Arguments of a site on another device."""
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


@torch.no_grad()
@all_on_gpu_last_on_cpu("recipe", RECIPES)
def test_every_site_of_fq_vit_has_the_integers_of_the_cpu(recipe, device):
    model = quantized(recipe, method=Observe("minmax"))
    sites, inputs = dict(quantizers(model)), {}
    with watching(sites, before=lambda name, args: inputs.setdefault(name, args)):
        model(pixels(seed=1))
    assert inputs.keys() == sites.keys()
    for name, quantizer in sites.items():
        there = copy.deepcopy(quantizer).to(device)
        codes, expected = there.encode(*moved(inputs[name], device)), quantizer.encode(*inputs[name])
        assert codes.device.type == device.type
        assert torch.equal(codes.cpu(), expected), name
        assert torch.equal(there.decode(codes).cpu(), quantizer.decode(expected)), name


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["vvtq", *RECIPES])
def test_evaluation_does_not_make_the_host_wait(recipe, gpu):
    model = quantized(recipe, method=None if recipe == "vvtq" else Observe("minmax")).to(gpu)
    images = pixels(seed=1).to(gpu)
    first = model(images)  # what follows from the parameters alone may be fetched once, and kept
    set_wait_mode("error")
    second = model(images)
    set_wait_mode("default")
    assert torch.equal(first, second)


@torch.no_grad()
def test_evaluation_reads_no_value_from_a_pretended_gpu():
    """Runs without a GPU: torch knows the shapes and devices of fake tensors, and refuses to read a value from one."""
    for recipe in ("vvtq", "repq_vit", "bitlog2_half_16"):
        model = quantize(float_model(), build_recipe(recipe, w_bits=4, a_bits=4)).eval()
        with FakeTensorMode() as mode:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            fake = mode.from_tensor(tensor).to("cuda")
                            tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
            assert model(torch.empty(8, 3, 32, 32, device="cuda")).device.type == "cuda"


@all_on_gpu_last_on_cpu("recipe", ["vvtq", "fq_vit_888"])
def test_a_model_is_evaluated_under_bfloat16_autocast(recipe, config, device, tmp_path):
    """bfloat16 has 8 bits of mantissa, so values near a border between two codes may get the other code."""
    words = ["validate", "--config", str(config), "--model.recipe", recipe, "--runs", str(tmp_path), *on(device)]
    words += ["--calibration.method", "Observe"] * (recipe != "vvtq") + ["--trainer.precision"]
    single, half = (run([*words, precision]).trainer.callback_metrics for precision in ("32-true", "bf16-mixed"))
    assert single["val/images"] == half["val/images"] == 12
    assert float(half["val/loss"]) == pytest.approx(float(single["val/loss"]), rel=0.1)
