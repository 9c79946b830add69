"""How weights are learned: the worked examples of AdaRound and low-rank compensation, and what every rule promises."""

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.reconstruction.adaround import AdaRound, RoundedWeight
from qat.ptq.reconstruction.learned_weights import Nearest, WeightRule
from qat.ptq.reconstruction.low_rank import CompensatedWeight, LowRank, Mode, mixture
from qat.ptq.reconstruction.straight_through import StraightThrough
from qat.quantizers import LSQ, AdaLog, Layout, Quantizer, Uniform
from qat.sites.insert import WeightSite

FRACTIONS = [0, 0.1, 0.25, 0.5, 0.75, 0.9]
V = [-2.397895, -1.609438, -0.887303, 0, 0.887303, 1.609438]
W = torch.tensor([[0.50, -0.20, 0.10, 0.36], [-0.40, 0.30, 0.04, -0.10], [0.15, 0.25, -0.45, 0.60]])
B = torch.tensor([[0.4], [-0.45], [0.6]])
A = torch.tensor([[0.10, 0.05, -0.20, 0.15]])
X = torch.tensor([1, -2, 0.5, 1.5])


def site(weight: Tensor, quantizer: Quantizer) -> WeightSite:
    return WeightSite("layer.weight_quant", nn.Parameter(weight), quantizer)


def uniform(step: list[float], zero: list[float], bits: int = 3) -> Quantizer:
    found = Uniform(bits, granularity="channel").build(Layout(0, len(step), batched=False))
    found.set_({"step": torch.tensor(step), "zero_point": torch.tensor(zero)})
    return found


def random_site(seed: int = 0) -> WeightSite:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
    quantizer = Uniform(3, granularity="channel").build(Layout(0, 6, batched=False))
    quantizer.set_range_(0.7 * weight.amin(1), 0.7 * weight.amax(1))
    return site(weight, quantizer)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rounded(rule: AdaRound | None = None) -> RoundedWeight:
    quantizer = uniform([1.0], [3.0])
    found = (rule or AdaRound()).start(site(torch.tensor([FRACTIONS]), quantizer), generator())
    assert isinstance(found, RoundedWeight)
    return found


class TestAdaRound:
    def test_it_starts_at_the_fractions(self):
        """The printed digits are six."""
        weight = rounded()
        torch.testing.assert_close(weight.V.detach()[0], torch.tensor(V), atol=1e-6, rtol=0)
        torch.testing.assert_close(weight(torch.empty(0)).detach()[0], torch.tensor(FRACTIONS, dtype=torch.float32))

    @pytest.mark.parametrize(
        ("t", "beta", "total"),
        [(4000, 20, 4.976940), (8000, 15.5, 4.937017), (12000, 11, 4.827225), (16000, 6.5, 4.508965), (20000, 2, 3.22)],
    )
    def test_its_regularizer_and_the_exponent(self, t, beta, total):
        rule = AdaRound(regularizer=1)
        assert rule.beta(t / 20000) == pytest.approx(beta)
        found = rounded(rule).regularizer(t / 20000).detach()
        assert float(found) == pytest.approx(total, abs=2e-5)

    def test_a_part_of_the_iterations_is_free_of_it(self):
        assert rounded().regularizer(0.199) is None
        assert rounded(AdaRound(regularizer=0)).regularizer(0.9) is None

    def test_values_in_the_end_are_up_where_V_is_not_negative(self):
        weight = rounded().eval()
        assert weight(torch.empty(0))[0].tolist() == [0, 0, 0, 1, 1, 1]

    def test_a_weight_beyond_the_range_stays_at_its_end(self):
        quantizer = uniform([0.1], [0.0], bits=2)
        found = AdaRound().start(site(torch.tensor([[-0.5, 0.95]]), quantizer), generator()).eval()
        torch.testing.assert_close(found(torch.empty(0)), torch.tensor([[0, 0.3]]))

    def test_values_that_are_not_evenly_spaced_are_refused(self):
        with pytest.raises(QatError, match="AdaRound rounds to evenly spaced values"):
            AdaRound().start(site(W, AdaLog(3).build(Layout(0, 1, batched=False))), generator())


class TestLowRank:
    def compensated(self, mode: Mode = "merged") -> CompensatedWeight:
        found = LowRank(rank=1, mode=mode).start(site(W, uniform([0.1, 0.1, 0.15], [2, 4, 3])), generator())
        assert isinstance(found, CompensatedWeight)
        with torch.no_grad():
            found.A.copy_(A)
            found.B.copy_(B)
        return found

    def test_it_starts_as_nearest_rounding(self):
        weight = random_site()
        found = LowRank(rank=4).start(weight, generator())
        assert torch.equal(found(weight.weight), weight.quantizer(weight.weight))
        assert isinstance(found, CompensatedWeight)
        assert float(found.A.abs().max()) <= 10**-0.5

    def test_values_of_the_worked_example(self):
        expected = torch.tensor([[0.5, -0.2, 0, 0.4], [-0.4, 0.3, 0.1, -0.2], [0.15, 0.3, -0.45, 0.6]])
        values = self.compensated()(W)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(values @ X, torch.tensor([1.5, -1.25, 0.225]))

    def test_values_beside_the_rounded_weight_of_the_worked_example(self):
        expected = torch.tensor([[0.54, -0.18, 0.02, 0.46], [-0.445, 0.2775, 0.09, -0.1675], [0.21, 0.33, -0.57, 0.69]])
        for mode in ("side", "requantized"):
            values = self.compensated(mode)(W)
            torch.testing.assert_close(values, expected)
            torch.testing.assert_close(values @ X, torch.tensor([1.6, -1.20625, 0.3]))

    def test_what_becomes_of_a_sum_that_was_trained_beside_the_weight(self):
        merged, side, requantized = (self.compensated(mode).eval() for mode in ("merged", "side", "requantized"))
        assert torch.equal(side.folded(W), side(W))
        assert torch.equal(requantized(W), merged(W))
        assert torch.equal(requantized.folded(W), merged.folded(W))
        assert [weight.stays_float for weight in (merged, side, requantized)] == [False, True, False]
        assert side.bits_per_weight == 3 + 16 * (3 + 4) / (3 * 4)

    @pytest.mark.parametrize(("rank", "expected"), [(20, 5.22), (100, 14.11)])
    def test_what_a_block_of_deit_tiny_keeps_for_each_weight(self, rank, expected):
        """qkv, proj, fc1 and fc2 at 3 bits: table 5.4 of the specification."""
        total = bits = 0.0
        for rows, columns in ((576, 192), (192, 192), (768, 192), (192, 768)):
            weight = site(torch.zeros(rows, columns), uniform([1.0] * rows, [0.0] * rows))
            learned = LowRank(rank=rank, mode="side").start(weight, generator())
            total += rows * columns
            bits += rows * columns * learned.bits_per_weight
        assert bits / total == pytest.approx(expected, abs=0.006)

    def test_gradients_of_the_worked_example(self):
        weight = self.compensated()
        (weight(W) @ X - W @ X).square().sum().backward()
        assert weight.A.grad is not None
        assert weight.B.grad is not None
        torch.testing.assert_close(weight.B.grad[:, 0], torch.tensor([0.0025, -0.03, 0]), atol=1e-6, rtol=1e-4)
        expected = torch.tensor([-0.004, 0.008, 0.058, 0.174])
        torch.testing.assert_close(weight.A.grad[0], expected, atol=1e-6, rtol=1e-4)

    def test_the_mixture_of_the_worked_example(self):
        alpha = torch.tensor([0, 0.5, -0.3])
        torch.testing.assert_close(mixture(alpha, [True] * 3), torch.tensor([0.295025, 0.486415, 0.218560]))
        torch.testing.assert_close(mixture(alpha, [True, True, False]), torch.tensor([0.377541, 0.622459, 0]))

    def test_a_rank_beyond_that_of_the_weight_is_said(self, caplog):
        LowRank(rank=100).start(random_site(), generator())
        assert "rank 100, and the weight has rank 6 at most" in caplog.text


RULES = [AdaRound(), StraightThrough(), LowRank(rank=3), LowRank(rank=3, mode="requantized")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_folded_it_gives_the_very_same_values(rule: WeightRule):
    """The quantizer itself finds, bit for bit, what the layer multiplied by at the end."""
    weight = random_site()
    learned = rule.start(weight, generator())
    assert learned is not None
    with torch.no_grad():
        for parameter in learned.learned():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator()))
    values = learned.eval()(weight.weight).detach()
    assert torch.equal(weight.quantizer(learned.folded(weight.weight)), values)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_neither_the_weight_nor_the_quantizer_is_learned(rule: WeightRule):
    weight = random_site()
    learned = rule.start(weight, generator())
    assert learned is not None
    assert not {id(p) for p in learned.learned()} & {id(p) for p in (weight.weight, *weight.quantizer.parameters())}
    weight.quantizer.requires_grad_(False)
    learned(weight.weight).sum().backward()
    assert weight.weight.grad is None
    assert all(parameter.grad is not None for parameter in learned.learned())


def test_a_lsq_grid_can_be_rounded_too():
    weight = torch.randn(4, 5, generator=generator())
    quantizer = LSQ(3, granularity="channel").build(Layout(0, 4, batched=False))
    quantizer.init_from(weight)
    learned = AdaRound().start(site(weight, quantizer), generator()).eval()
    inside = weight.abs() < 3 * quantizer.step.detach()[:, None]
    assert torch.equal(learned(weight)[inside], quantizer(weight)[inside])
    assert torch.equal(quantizer(learned.folded(weight)), learned(weight))


def test_nothing_is_learned_by_nearest():
    assert Nearest().start(random_site(), generator()) is None
