"""Compiled arithmetic gives the bits of the eager one, and needs few compilations."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from qat import build_float, build_recipe, calibrate, quantize
from qat.errors import QatError
from qat.quantizers import LSQ, PTF, BitLog2, IntegerNorm, LogSqrt2, LSQQuantizer, Quantizer, Spec, Uniform, kernels
from qat.quantizers.layout import Layout
from qat.sites.insert import quantizers
from tests.conftest import TINY


@pytest.fixture(scope="module")
def fast() -> kernels.Kernels:
    try:
        return kernels.compiled("cpu")
    except QatError as error:
        pytest.skip(str(error))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(fast: kernels.Kernels, x: Tensor, step: Tensor, offset: Tensor | None, *bounds: object) -> None:
    """Equal values and gradients of ``x``; sums over a group are equal but for the order of their terms."""
    grad = random(*x.shape, seed=1)
    assert torch.equal(fast.values(x, step, offset, *bounds), kernels.EAGER.values(x, step, offset, *bounds))
    ours, theirs = (way.gradients(x, step, offset, grad, *bounds) for way in (fast, kernels.EAGER))
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        if b is not None:
            assert isinstance(a, Tensor)
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_the_same_bits_for_every_shape_of_the_step(fast: kernels.Kernels, offset: bool, strided: bool) -> None:
    for shape, steps in (((7, 33), (1,)), ((6, 40), (6, 1)), ((2, 3, 5, 8), (1, 3, 1, 1))):
        x = random(*shape).mT.contiguous().mT if strided else random(*shape)
        step = random(*steps, seed=2).abs() * 0.2 + 0.05
        assert_same(fast, x, step, random(*steps, seed=3) * 0.1 if offset else None, -4, 3)


COMPILED: list[tuple[Spec, Layout]] = [
    (Uniform(4), Layout(0, 1, batched=True)),
    (Uniform(8, zero="none", signed=True, granularity="channel"), Layout(0, 6, batched=False)),
    (Uniform(4, zero="code", granularity="channel"), Layout(-1, 40, batched=True)),
    (PTF(8), Layout(-1, 40, batched=True)),
]


def calibrated(spec: Spec, layout: Layout) -> Quantizer:
    quantizer = spec.build(layout)
    quantizer.init_from(quantizer.grouped(random(6, 40) + 0.3))
    return quantizer


def test_a_compiled_quantizer_gives_the_bits_of_the_eager_one(fast: kernels.Kernels) -> None:
    for (spec, layout), seed in product(COMPILED, (0, 1)):
        found = []
        for compiled in (False, True):
            quantizer, x = calibrated(spec, layout), random(6, 40, seed=seed).mul_(2).requires_grad_()
            assert not compiled or quantizer.compile_()
            out = quantizer(x)
            out.backward(random(6, 40, seed=5))
            found.append((out.detach(), x.grad, quantizer.step.grad))
        assert torch.equal(found[0][0], found[1][0]), spec
        assert torch.equal(found[0][1], found[1][1]), spec
        torch.testing.assert_close(found[0][2], found[1][2], msg=str(spec))


def test_a_zero_point_of_another_value_needs_no_compilation(fast: kernels.Kernels) -> None:
    quantizer = calibrated(*COMPILED[0])
    quantizer.compile_()
    counts = []
    for zero in (3, 7, 8, 11):
        quantizer.zero_point.fill_(zero)
        quantizer(random(6, 40).requires_grad_()).sum().backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[-1]


def test_an_integer_norm_compiles_its_backward(fast: kernels.Kernels) -> None:
    integers, found = (random(6, 40) * 50).round(), []
    for compiled in (False, True):
        quantizer, y = calibrated(IntegerNorm(8), Layout(0, 1, batched=True)), random(6, 40).requires_grad_()
        assert not compiled or quantizer.compile_()
        out = quantizer(y, integers)
        out.backward(random(6, 40, seed=5))
        found.append((out.detach(), y.grad, quantizer.step.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2])


def test_quantizers_without_compiled_arithmetic_say_so() -> None:
    for spec in (LogSqrt2(4), BitLog2(4), Uniform(4, zero="fractional")):
        quantizer = spec.build(Layout(0, 1, batched=True))
        assert not quantizer.compile_()
        assert not quantizer.compiled


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
    x = random(64)
    for again in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert again.compiled
        assert torch.equal(again(x), quantizer(x))


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    kernels.compiled.cache_clear()
    with pytest.raises(QatError, match=r"model\.compile: .* on cpu here \(no compiler found\)"):
        kernels.compiled("cpu")
    kernels.compiled.cache_clear()


def test_the_compiler_is_tried_on_the_kind_of_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: lambda x, *rest: tried.append(x.device.type) or x)
    kernels.compiled.cache_clear()
    for device in ("cpu", "meta", "meta"):
        kernels.compiled(device)
    assert tried == ["cpu", "meta"]  # once for each
    kernels.compiled.cache_clear()
