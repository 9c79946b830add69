"""How far the channels of an activation are brought to one range."""

import pytest
import torch
from torch import Tensor, nn

from qat.ptq.channel_ranges import NARROWEST, best_strength, fit_channels, to_common_range
from qat.quantizers import Layout, Uniform, UniformQuantizer


def channels(step: list[float], zero: list[float]) -> UniformQuantizer:
    found = Uniform(4, granularity="channel").build(Layout(-1, len(step), batched=True))
    found.set_({"step": torch.tensor(step), "zero_point": torch.tensor(zero)})
    return found


def test_full_strength_is_that_of_repq_vit():
    step, zero = torch.tensor(0.25).double(), torch.tensor(6.0).double()
    ratio, shift = to_common_range(channels([0.25, 0.5], [8, 6]), step, zero, 1.0)
    assert (ratio.tolist(), shift.tolist()) == ([1, 2], [0.25 * 2, 0.5 * 0])  # s / s~, s (z - z~)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.999999])
def test_the_middle_of_every_range_becomes_that_of_the_common_one(strength):
    found, step, zero = channels([0.25, 0.5, 2], [8, 6, 1]), torch.tensor(0.5).double(), torch.tensor(5.0).double()
    ratio, shift = to_common_range(found, step, zero, strength)
    middle = (7.5 - found.zero_point.double()) * found.step.double()  # codes run from 0 to 15
    torch.testing.assert_close((middle + shift) / ratio, ((7.5 - zero) * step).expand(3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ratio, (found.step.detach().double() / step) ** strength)


def test_a_channel_that_is_almost_constant_gets_a_part_of_the_mean_range_around_its_middle():
    rows = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [2.0], [1e-4]])
    found = Uniform(4, granularity="channel").build(Layout(-1, 3, batched=True))
    fit_channels(found, rows)
    step = found.step.detach()
    low, high = step * (0 - found.zero_point), step * (15 - found.zero_point)
    # the mean was that of two steps, because the third was next to 0
    assert float(step[2]) == pytest.approx(NARROWEST * float(step[:2].sum()) / 3, rel=0.01)
    assert low[2] < 0 < high[2]


class Layer(nn.Module):
    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.weight_quant = Uniform(bits, granularity="channel").build(Layout(0, len(weight), batched=False))


def test_weights_with_few_bits_take_less_of_the_differences():
    """A weight that is almost exact can take all of them, one of two bits less."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 8, generator=generator) * torch.logspace(-1, 1, 8)
    found = Uniform(4, granularity="channel").build(Layout(-1, 8, batched=True))
    fit_channels(found, rows.T)
    site = Uniform(4).build(Layout(0, 1, batched=True))
    step, zero = found.step.detach().double().mean(), found.zero_point.double().mean().round()
    weight = torch.randn(16, 8, generator=generator)
    exact, coarse = (best_strength(found, step, zero, rows, site, [Layer(weight, bits)]) for bits in (16, 2))
    assert coarse < exact == 1.0
