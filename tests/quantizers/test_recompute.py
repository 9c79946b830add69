"""Products keep no quantized activation, and their gradients are those of the plain product."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qat.quantizers import LSQ, LSQQuantizer, Quantizer, Spec, blocks, operands_kept, recompute_operands
from qat.quantizers.layout import Layout
from qat.sites.insert import FloatSite


def site(batched: bool) -> LSQQuantizer:
    quantizer = LSQQuantizer(LSQ(bits=4), Layout(0, 1, batched))
    nn.init.constant_(quantizer.step, 0.1)
    return quantizer


def plain(op: object, *operands: tuple[nn.Module, Tensor]) -> Tensor:
    return op(*[module(x) for module, x in operands])  # type: ignore[operator]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


@pytest.mark.parametrize("op", [F.linear, scores], ids=["linear", "scores"])
def test_gradients_are_those_of_the_plain_product(op: object) -> None:
    shapes = ((3, 5, 8), (6, 8)) if op is F.linear else ((2, 3, 5, 8), (2, 3, 5, 8))
    found = []
    for way in (recompute_operands, plain):
        first, second = site(True), site(op is not F.linear)
        x, y = leaf(*shapes[0]), leaf(*shapes[1])
        way(op, (first, x), (second, y)).square().sum().backward()
        found.append([x.grad, y.grad, first.step.grad, second.step.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def kept(op: object, way: object, *operands: tuple[nn.Module, Tensor]) -> int:
    """Bytes that the product allocates and does not free, its result left out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = way(op, *operands)  # type: ignore[operator]
    out.sum().backward()
    return sum(e.self_cpu_memory_usage for e in profiler.key_averages()) - out.untyped_storage().nbytes()


def test_only_quantized_weights_are_kept() -> None:
    x, weight = leaf(64, 50, 80), leaf(60, 80)
    quantized, slack = ((site(True), x), (site(False), weight)), 1000  # bytes of scalars
    assert kept(F.linear, plain, *quantized) == pytest.approx(4 * (x.numel() + weight.numel()), abs=slack)
    assert kept(F.linear, recompute_operands, *quantized) == pytest.approx(4 * weight.numel(), abs=slack)
    assert kept(F.linear, recompute_operands, (FloatSite(), x), (FloatSite(), weight)) == pytest.approx(0, abs=slack)


def test_under_autocast_the_low_precision_copy_is_not_kept_either() -> None:
    x, weight = leaf(64, 50, 80), leaf(60, 80)
    operands = ((site(True), x), (site(False), weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(F.linear, plain, *operands) >= 2 * x.numel()
        assert kept(F.linear, recompute_operands, *operands) <= 6 * weight.numel() + 1000  # float32 and bfloat16


def test_autocast_gradients_are_those_of_the_plain_product() -> None:
    found = []
    for way in (recompute_operands, plain):
        x, weight, first, second = leaf(3, 5, 8), leaf(6, 8), site(True), site(False)
        with torch.autocast("cpu", torch.bfloat16):
            out = way(F.linear, (first, x), (second, weight))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        found.append([x.grad, weight.grad, first.step.grad, second.step.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_input_that_was_changed_is_noticed() -> None:
    x, weight = leaf(4, 8).detach(), leaf(6, 8)
    quantizer = site(True)
    quantizer.step.requires_grad_(False)
    out = recompute_operands(F.linear, (quantizer, x), (site(False), weight))
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_strided_operands_come_back_in_their_shape() -> None:
    qkv = leaf(2, 5, 3, 4, 8)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    recompute_operands(scores, (site(True), q), (site(True), k)).square().sum().backward()
    ours, qkv.grad = qkv.grad, None
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    plain(scores, (site(True), q), (site(True), k)).square().sum().backward()
    assert torch.equal(ours, qkv.grad)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Random(Spec):
    """Whole numbers, rounded up with the probability of the fraction: the same input has many outputs."""

    def build(self, layout: Layout) -> RandomQuantizer:
        return RandomQuantizer(self, layout)


class RandomQuantizer(Quantizer):
    deterministic = False

    def forward(self, x: Tensor) -> Tensor:
        return x + ((x.detach() + torch.rand_like(x)).floor() - x.detach())

    def encode(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def init_from(self, samples: Tensor) -> None:
        raise NotImplementedError


class SaidToBeDeterministic(RandomQuantizer):
    deterministic = True


def weight_gradient(way: object, kind: type[RandomQuantizer]) -> Tensor:
    x, weight = leaf(64, 8), leaf(6, 8)
    torch.manual_seed(0)
    way(F.linear, (kind(Random(4), Layout(0, 1, batched=True)), x), (FloatSite(), weight)).sum().backward()  # type: ignore[operator]
    assert weight.grad is not None
    return weight.grad


def test_the_output_of_a_random_quantizer_is_kept() -> None:
    """Computed again it would be another, and the gradient that of a product that never was."""
    expected = weight_gradient(plain, RandomQuantizer)
    assert torch.equal(weight_gradient(recompute_operands, RandomQuantizer), expected)
    assert not torch.equal(weight_gradient(recompute_operands, SaidToBeDeterministic), expected)


def test_outputs_that_are_computed_in_blocks_come_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (2**17, 16):
        monkeypatch.setattr(blocks, "CPU_BLOCK", size)
        x, weight, first, second = leaf(3, 5, 8), leaf(6, 8), site(True), site(False)
        recompute_operands(F.linear, (first, x), (second, weight)).square().sum().backward()
        found.append([x.grad, weight.grad, first.step.grad, second.step.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operands_can_be_kept_after_all_with_the_same_gradients() -> None:
    found, bytes_kept = [], []
    for block in (nullcontext(), operands_kept()):
        x, weight, first, second = leaf(64, 50, 80), leaf(60, 80), site(True), site(False)
        with block:
            bytes_kept.append(kept(F.linear, recompute_operands, (first, x), (second, weight)))
        found.append([x.grad, weight.grad, first.step.grad, second.step.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert bytes_kept[1] - bytes_kept[0] == pytest.approx(4 * x.numel(), abs=1000)
