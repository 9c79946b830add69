"""Running ranges: the numbers of released FQ-ViT's observers, and which samples are kept."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.ptq.running_range import EMA, OBSERVERS, OMSE, MinMax, Percentile, Samples, running_range_for
from qat.quantizers import LSQ, PTF, Uniform, UniformQuantizer
from qat.quantizers.spec import Layout

BATCHES = [torch.tensor([[-1, 0.5, 2, 3]]), torch.tensor([[-2, 0.25, 1, 6]])]
UINT8 = Uniform(8, zero="clipped")


class Rangeless(UniformQuantizer):
    ranged = False

    def init_from(self, samples: Tensor) -> None:
        self.started_from = samples


def layout(groups: int = 1) -> Layout:
    return Layout(-1, groups, batched=True)


def draw(seed: int, groups: int = 1, n: int = 2000) -> Tensor:
    return torch.randn(groups, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "low", "high", "step"),
    [
        (MinMax, -2, 6, 0.031372549),
        (EMA, -1.01, 3.03, 0.015843137),
        (Percentile, -1.009954775, 3.029968800, 0.015842838),
    ],
)
def test_activations_of_the_released_code(kind, low, high, step):
    quantizer = UINT8.build(layout())
    running = kind(quantizer)
    for batch in BATCHES:
        running.update(batch)
    running.calibrate_()
    assert [end.item() for end in running.range()] == pytest.approx([low, high])
    assert quantizer.step.item() == pytest.approx(step)
    assert quantizer.zero_point.item() == 64


def test_weights_of_the_released_code():
    weight = torch.tensor([[0.5, -1, 0.25], [0.1, 0.2, -0.05]]).double()  # -1 is halfway between -127 and -128
    spec = Uniform(8, signed=True, zero="none", granularity="channel")
    quantizer = spec.build(Layout(0, 2, batched=False)).double()
    running = MinMax(quantizer)
    running.update(quantizer.grouped(weight))
    running.calibrate_()
    torch.testing.assert_close(quantizer.step.data, torch.tensor([0.00784313725, 0.00156862745]).double())
    assert quantizer.encode(weight).tolist() == [[64, -128, 32], [64, 127, -32]]


def test_a_range_without_zero_loses_its_top_as_released():
    quantizer = UINT8.build(layout())
    running = MinMax(quantizer)
    running.update(torch.tensor([[2.0, 5, 3, 4]]))
    running.calibrate_()
    torch.testing.assert_close(quantizer(torch.tensor([2.0, 5, 3, 4])).detach(), torch.tensor([2.0, 3, 3, 3]))


def test_omse_is_the_best_of_ninety_ranges_on_samples_of_all_batches():
    batches = [draw(seed) for seed in range(3)]
    batches[0][0, 0] = 60  # an outlier of the first batch; the released code would not see it
    quantizer, trial = Uniform(4).build(layout()), Uniform(4).build(layout())
    running = OMSE(quantizer)
    for batch in batches:
        running.update(batch)
    running.calibrate_()
    x = torch.cat(batches, 1)
    scores = []
    for i in range(90):
        trial.set_range_(x.amin(1) * (1 - 0.01 * i), x.amax(1) * (1 - 0.01 * i))
        scores.append((trial(x).detach() - x).square().mean().item())
    best = 1 - 0.01 * int(np.argmin(scores))
    assert 0.11 <= best < 1
    assert running.range()[1].item() == pytest.approx(60 * best)
    trial.set_range_(x.amin(1) * best, x.amax(1) * best)
    torch.testing.assert_close(quantizer.step, trial.step)


@pytest.mark.parametrize("kind", OBSERVERS.values())
def test_every_group_is_observed_alone(kind):
    scale = torch.tensor([1.0, 10.0, 0.1])[:, None]
    together = Uniform(4).build(layout(3))
    running = kind(together)
    for seed in range(2):
        running.update(draw(seed, 3) * scale)
    running.calibrate_()
    for group in range(3):
        alone = Uniform(4).build(layout())
        running = kind(alone)
        for seed in range(2):
            running.update((draw(seed, 3) * scale)[group : group + 1])
        running.calibrate_()
        torch.testing.assert_close(together.step[group], alone.step[0])


def test_samples_are_bounded_and_repeatable():
    def kept(seed: int) -> Tensor:
        samples = Samples(50, torch.Generator().manual_seed(seed))
        for batch in range(3):
            samples.update(draw(batch, 2))
        samples.update(draw(9, 2, n=7))  # a small batch is kept whole
        return samples.joined()

    assert kept(0).shape == (2, 157)
    assert torch.equal(kept(0), kept(0))
    assert not torch.equal(kept(0), kept(1))
    assert torch.equal(kept(0)[:, -7:], draw(9, 2, n=7))


def test_values_are_kept_only_where_they_are_needed():
    for kind in (MinMax, EMA, Percentile):
        running = kind(LSQ(4).build(layout()))
        running.update(draw(0))
        assert not running.kept._parts
    running = OMSE(LSQ(4).build(layout(4)), samples=100)
    running.update(draw(0, 4))
    assert running.kept.joined().shape == (4, 25)  # the bound is of all groups together


@pytest.mark.parametrize("kind", OBSERVERS)
def test_powers_of_two_have_the_range_of_all_values_and_the_shifts_of_the_samples(kind):
    tokens = torch.tensor(
        [
            [0.113, -1.43, 2.71, 5.21, -3.11],
            [-0.207, 1.57, -1.93, -4.87, 7.93],
            [0.061, 0.81, 0.37, 0.63, 12.77],
            [0.158, -0.69, -2.77, 3.39, -12.73],
        ]
    )
    quantizer = PTF(8, zero="clipped").build(layout(5))
    running = running_range_for(quantizer, kind, samples=100, seed=0)
    for batch in tokens.chunk(2):
        running.update(quantizer.grouped(batch))
    running.calibrate_()
    assert quantizer.step.item() == pytest.approx(0.0125)
    assert quantizer.zero_point.item() == 127
    assert quantizer.shift.tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("kind", OBSERVERS)
def test_a_kind_without_a_range_starts_from_the_samples(kind):
    quantizer = Rangeless(Uniform(4), layout())
    running = running_range_for(quantizer, kind, samples=30, seed=0)
    running.update(draw(0))
    running.calibrate_()
    assert quantizer.started_from.shape == (1, 30)
