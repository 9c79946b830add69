"""Work in pieces gives what it gives at once, for every quantizer that is cut. Shape letters: G groups, n values."""

import pytest
import torch
from torch import Tensor

from qat.quantizers import AdaLog, Quantizer, Spec, TwinGelu, TwinSoftmax, pieces
from qat.quantizers.layout import Layout

LAYOUTS = [Layout(0, 1, True), Layout(0, 6, False), Layout(0, 3, False), Layout(1, 4, True), Layout(-1, 5, True)]
SPECS = [AdaLog(3), AdaLog(3, shifted=True), TwinSoftmax(3), TwinSoftmax(3, overlap=True), TwinGelu(3)]


def results(quantizer: Quantizer, x: Tensor) -> list[Tensor]:
    """Values, gradients and codes."""
    leaf, quantizer.step.grad = x.clone().requires_grad_(), None
    out = quantizer(leaf)
    out.backward(x)
    return [out.detach(), leaf.grad, quantizer.step.grad, quantizer.encode(x)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pieces_have_the_values_codes_and_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch, spec: Spec, layout):
    x = torch.rand(6, 4, 10, generator=torch.Generator().manual_seed(0))
    quantizer = spec.build(layout)
    quantizer.init_from(quantizer.grouped(x))
    quantizer.step.data *= 2.0 ** -torch.arange(layout.groups)  # every group has its own
    for order in (x, x.mT.contiguous().mT):
        whole = results(quantizer, order)
        for size in (1, 9, 45):
            with monkeypatch.context() as patch:
                patch.setattr(pieces, "CPU_PIECE", size)
                assert all(torch.equal(a, b) for a, b in zip(results(quantizer, order), whole, strict=True))


def test_a_row_for_each_group_is_cut_with_its_constant(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "CPU_PIECE", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, steps = torch.arange(12.0).view(2, 6), torch.tensor([[1.0], [2.0]])  # (G, n), (G, 1)
    found = [(part.tolist(), step.tolist()) for part, step in pieces.pieces((x,), (steps,))]
    assert found == [([0, 1, 2, 3], [1]), ([4, 5], [1]), ([6, 7, 8, 9], [2]), ([10, 11], [2])]
    monkeypatch.setattr(pieces, "CPU_PIECE", 12)
    assert len(list(pieces.pieces((x,), (steps,)))) == 1
