"""Quantiles of long rows: the numbers of numpy, in a fraction of the time."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.ptq import quantiles as module
from qat.ptq.quantiles import outermost, quantiles, ranked

EXTREME = (0.0, 0.00001, 0.0001, 0.001, 0.999, 0.9999, 0.99999, 1.0)
ALL = (*EXTREME, 0.01, 0.03, 0.2, 0.5, 0.77, 0.95)
LONG = 70_001  # longer than a row that topk sees whole


def assert_as_numpy(x: Tensor, shares: tuple[float, ...] = ALL) -> None:
    expected = np.quantile(x.double().numpy(), shares, axis=1)
    torch.testing.assert_close(quantiles(x, shares).double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (3, 7), (40, 97), (7, 6304), (1, LONG), (3, LONG), (2, 300_000)])
def test_the_numbers_of_numpy(shape):
    assert_as_numpy(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("n", [50, LONG])
@pytest.mark.parametrize(
    "change",
    [
        torch.zeros_like,
        torch.relu,  # half of the row ties at its lower end
        lambda x: x.round(),
        lambda x: (x > 2).float(),
        lambda x: x.sort(dim=1).values,
        lambda x: x * torch.tensor([1e-6, 1.0, 1e4])[:, None],  # each row has its own tail
        lambda x: torch.cat([torch.zeros_like(x[:, :-3]), x[:, -3:]], 1),  # fewer values beyond the ties than wanted
    ],
    ids=["constant", "relu", "steps", "two values", "sorted", "scales", "outliers"],
)
def test_ties_order_and_scale_do_not_matter(change, n):
    assert_as_numpy(change(torch.randn(3, n, generator=torch.Generator().manual_seed(1))))


def test_a_case_by_hand():
    x = torch.tensor([[6.0, -2.0, 0.25, 1.0], [4.0, 4.0, 4.0, 5.0]])
    expected = torch.tensor([[-2.0, 4.0], [0.625, 4.0], [4.5, 4.7]])  # 0.9 of three steps is 2.7
    torch.testing.assert_close(quantiles(x, (0, 0.5, 0.9)), expected)


def test_a_misleading_sample_costs_only_time(monkeypatch):
    x = torch.randn(2, LONG, generator=torch.Generator().manual_seed(2))
    for place in (x[0].argmax(), x[0].argmin()):
        monkeypatch.setattr(torch, "randint", lambda n, size, generator, place=place: torch.full(size, int(place)))
        assert_as_numpy(x, EXTREME)


def test_few_values_are_sorted(monkeypatch):
    x = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(3))
    lengths = []
    topk = Tensor.topk

    def counted(self, *args, **options):
        lengths.append(self.shape[1])
        return topk(self, *args, **options)

    monkeypatch.setattr(Tensor, "topk", counted)
    quantiles(x, EXTREME)
    assert len(lengths) == 4  # a sample and the survivors, of either tail
    assert max(lengths) <= module.SAMPLE


def test_half_precision_is_read_in_single():
    x = torch.linspace(0, 1, 1001).half()[None]
    assert quantiles(x, (0.5,)).dtype == torch.float32
    assert quantiles(x.double(), (0.5,)).dtype == torch.float64


def test_ranks_come_in_order():
    x = torch.arange(1000.0).flip(0)[None]
    assert torch.cat(ranked(x, [0, 3, 500, 998])).tolist() == [0, 3, 500, 998]


def test_the_outermost_values_are_sorted():
    x = torch.arange(float(LONG))[None].roll(777)
    assert outermost(x, 3, largest=True).tolist() == [[LONG - 1, LONG - 2, LONG - 3]]
    assert outermost(x, 3, largest=False).tolist() == [[0, 1, 2]]
