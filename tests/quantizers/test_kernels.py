"""Compiled arithmetic gives the bits of the eager one, and needs few compilations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from qat import build_float, build_recipe, calibrate, quantize
from qat.errors import QatError
from qat.quantizers import LSQ, LSQQuantizer, kernels
from qat.quantizers.spec import Layout
from qat.sites.insert import quantizers
from tests.conftest import TINY


@pytest.fixture(scope="module")
def fast() -> kernels.Kernels:
    try:
        return kernels.compiled()
    except QatError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    ("shape", "steps"), [((7, 33), (1,)), ((6, 40), (6, 1)), ((2, 3, 5, 8), (1, 3, 1, 1))], ids=str
)
@pytest.mark.parametrize("strided", [False, True])
def test_same_bits(
    fast: kernels.Kernels, shape: tuple[int, ...], steps: tuple[int, ...], offset: bool, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if strided:
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    step = torch.rand(steps, generator=generator) * 0.2 + 0.05
    shift = torch.randn(steps, generator=generator) * 0.1 if offset else None
    slow = kernels.EAGER
    assert torch.equal(fast.values(x, step, shift, -4, 3), slow.values(x, step, shift, -4, 3))
    ours, theirs = (k.gradients(x, step, shift, grad, -4, 3) for k in (fast, slow))
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        if b is not None:  # sums over the group, which are added in another order
            assert isinstance(a, Tensor)
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_compilations_come_to_an_end(fast: kernels.Kernels) -> None:
    torch._dynamo.config.recompile_limit = 8  # torch's default; timm.optim raises it
    kernels.compiled.cache_clear()
    counts = []
    for depth, batch in ((1, 2), (3, 2), (3, 5), (3, 7), (4, 3)):
        args = {**TINY, "depth": depth, "drop_path_rate": 0.5}
        model = quantize(build_float("deit_tiny_patch16_224", None, 10, args), build_recipe("vvtq", w_bits=4, a_bits=4))
        images = torch.randn(batch, 3, 32, 32)
        calibrate(model.eval(), [images])
        for _, quantizer in quantizers(model):
            quantizer.compile_()
        model.train()
        model(images).square().mean().backward()
        with torch.autocast("cpu", torch.bfloat16):
            model(images).float().square().mean().backward()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                model.eval()(images)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert not torch._dynamo.utils.counters["graph_break"]
    assert counts[2] == counts[3] == counts[4], counts  # drop path, depth and batch add none
    assert counts[2] - counts[0] <= 4, counts  # a sum of more values can be cut in another way


def test_a_compiled_quantizer_can_be_copied_and_pickled(fast: kernels.Kernels) -> None:
    quantizer = LSQQuantizer(LSQ(bits=4), Layout(0, 1, batched=True))
    nn.init.constant_(quantizer.step, 0.1)
    quantizer.compile_()
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for again in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert again.compiled
        assert torch.equal(again(x), quantizer(x))


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    kernels.compiled.cache_clear()
    with pytest.raises(QatError, match=r"model\.compile: .*no compiler found\)"):
        kernels.compiled()
    kernels.compiled.cache_clear()
