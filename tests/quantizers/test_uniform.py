"""Uniform: ranges, zero points and codes worked out by hand, and the gradient of its step."""

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.quantizers import LSQ, Uniform, UniformQuantizer
from qat.quantizers.spec import Layout


def made(low: float, high: float, **options: object) -> UniformQuantizer:
    quantizer = Uniform(**{"bits": 4, **options}).build(Layout(0, 1, batched=True))
    quantizer.set_range_(torch.tensor([low]), torch.tensor([high]))
    return quantizer


@pytest.mark.parametrize(
    ("low", "high", "options", "step", "zero"),
    [
        (-1.0, 2.0, {}, 0.2, 5),
        (0.5, 2.0, {}, 0.1, -5),  # a range without zero has a zero point that is no code
        (0.5, 2.0, {"zero": "code"}, 2 / 15, 0),
        (-2.0, -0.5, {"zero": "code"}, 2 / 15, 15),
        (0.5, 2.0, {"zero": "clipped"}, 0.1, 0),
        (-1.0, 2.05, {"zero": "fractional"}, 3.05 / 15, 15 / 3.05),
        (-3.0, 2.0, {"zero": "none", "signed": True}, 0.4, 0),  # 2 * 3 / 15
        (0.0, 3.0, {"zero": "none"}, 0.2, 0),
        (-1.0, 2.0, {"signed": True}, 0.2, -3),
    ],
)
def test_step_and_zero_point_of_a_range(low, high, options, step, zero):
    quantizer = made(low, high, **options)
    assert quantizer.step.item() == pytest.approx(step)
    assert quantizer.zero_point.item() == pytest.approx(zero)


def test_codes_round_half_to_even_before_the_zero_point_is_added():
    quantizer = made(-1.0, 2.75, bits=4)  # step 0.25, zero 4
    x = torch.tensor([-9.0, -1.0, -0.375, -0.125, 0.0, 0.125, 0.375, 2.75, 9.0])
    assert quantizer.encode(x).tolist() == [0, 0, 2, 4, 4, 4, 6, 15, 15]
    assert quantizer(x).tolist() == [-1.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 2.75, 2.75]


def test_clipped_loses_the_far_end_of_an_all_positive_range():
    """The released FQ-ViT quantizer: 2, 5, 3, 4 become 2, 3, 3, 3."""
    assert made(2.0, 5.0, bits=8, zero="clipped")(torch.tensor([2.0, 5, 3, 4])).tolist() == pytest.approx([2, 3, 3, 3])


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (-0.5, -0.5), (1.0, 1.0005), (0.0, 0.0)])
def test_a_range_that_is_almost_a_point_is_represented(low, high):
    quantizer = made(low, high)
    assert 0 <= quantizer.zero_point.item() <= 15
    assert quantizer(torch.tensor([low])).item() == pytest.approx(low, rel=1e-3)


def test_the_step_learns_like_that_of_lsq():
    """With a zero point of 8, unsigned codes are the signed ones of LSQ."""
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    grads: list[tuple[Tensor, Tensor]] = []
    for spec, top in ((Uniform(4), 15), (LSQ(4), 7)):
        quantizer, leaf = spec.build(Layout(0, 1, batched=True)), x.clone().requires_grad_()
        with torch.no_grad():
            quantizer.step.fill_(0.3)
            if isinstance(quantizer, UniformQuantizer):
                quantizer.zero_point.fill_(8)
        quantizer(leaf).square().sum().backward()
        grads.append((leaf.grad, quantizer.step.grad * top**0.5))  # the gain counts the codes above zero
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{"zero": "some"}, {"zero": "fractional", "signed": True}])
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(QatError, match="zero"):
        Uniform(4, **options)
