"""`model.compile` on a GPU, against eager arithmetic.

Triton divides by an approximate reciprocal and adds after a product without rounding in between, unlike eager kernels.
A value on the border between two codes may therefore get the other code: at 8 bits some 5 of 100,000 lie that close.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.quantizers import LSQ, Quantizer
from qat.quantizers.layout import Layout
from qat.sites.insert import quantizers
from tests.gpu.models import pixels, quantized

OTHER_CODE = 1e-3  # the largest share of values that may get the neighbouring code


def gradients(quantizer: Quantizer, x: Tensor) -> list[Tensor]:
    """Of the input, the step and, if there is one, the offset."""
    inputs = [x.clone().requires_grad_(), *quantizer.parameters()]
    loss = (quantizer(inputs[0]) * torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)).sum()
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("offset", [False, True], ids=["LSQ", "LSQ+"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_compiled_quantizer_gives_the_values_and_gradients_of_an_eager_one(gpu, bits, offset):
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to(gpu)
    eager, compiled = (LSQ(bits, offset=offset).build(Layout(0, 1, batched=True)).to(gpu) for _ in range(2))
    for quantizer in (eager, compiled):
        quantizer.init_from(x.view(1, -1))
    assert compiled.compile_()
    difference = (compiled(x) - eager(x)).abs() / eager.step
    assert difference.max() < 1.01
    assert (difference > 1e-3).float().mean() < OTHER_CODE
    for mine, theirs in zip(gradients(compiled, x), gradients(eager, x), strict=True):
        if mine.numel() == 1:  # a sum over the tensor, added in another order
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-2)
        else:
            assert (mine != theirs).float().mean() < OTHER_CODE


def step(model: nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one training step."""
    images, labels = pixels(seed=1).to(device), (torch.arange(8) % 3).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model.train()(images)
    F.cross_entropy(logits.float(), labels).backward()
    return logits.detach().float(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_model_trains_like_an_eager_one(gpu, dtype):
    eager, compiled = (quantized("vvtq").to(gpu) for _ in range(2))  # 8 bits: another code moves a value by little
    assert all(quantizer.compile_() for _, quantizer in quantizers(compiled))
    (logits, grads), (expected, wanted) = step(compiled, dtype, gpu), step(eager, dtype, gpu)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        if name.endswith("weight"):
            assert F.cosine_similarity(grads[name].flatten(), grad.flatten(), dim=0) > 0.99, name
