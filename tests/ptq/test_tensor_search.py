"""First parameters by the error of every tensor. Shapes: G groups that share a step, n values in a group."""

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.tensor_search import LEAST, TensorSearch, fit, spread_out
from qat.quantizers import AdaLog, BitLog2, Layout, LogSqrt2, Uniform
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.spec import Spec
from qat.recipe import build_recipe
from qat.sites.family import family_of
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, switched_off, weights
from tests.ptq.test_output_search import batches, tiny


def draw(groups: int, n: int) -> Tensor:
    return torch.randn(groups, n, generator=torch.Generator().manual_seed(0)) ** 3


def error(quantizer: Quantizer, x: Tensor) -> float:
    return (quantizer(x) - quantizer.target(x)).square().mean().item()


def full_range(quantizer: Quantizer, x: Tensor) -> Quantizer:
    """One of the same kind for all values of a tensor."""
    found, rows = quantizer.spec.build(quantizer.layout), quantizer.grouped(x)
    if found.ranged and not found.refines:
        found.set_range_(rows.amin(1), rows.amax(1))
    else:
        found.init_from(rows)
    return found


@pytest.mark.parametrize("recipe", ["uniform", "frontier", "vvtq"])
@torch.no_grad()
def test_no_tensor_has_more_error_than_with_its_full_range(recipe):
    """Those of the first block, as the quantized embedding gives it its input."""
    model = tiny("deit", *build_recipe(recipe, w_bits=3, a_bits=3))
    TensorSearch(levels=3)(model, batches())
    embedding, block, *_ = family_of(model).units(model)
    tensors = {name: [weight] for name, weight, _ in weights(model) if name.startswith("blocks.0.")}
    sites = {name: q for name, q in quantizers(model) if name.startswith("blocks.0.") and q.layout.batched}
    inputs = [embedding.run(x) for x in batches()]
    with (
        switched_off(q for name, q in quantizers(model) if name.startswith("blocks.0.")),
        watching(sites, before=lambda name, args: tensors.setdefault(name, []).append(args[0])),
    ):
        for x in inputs:
            block.run(x)
    assert len(tensors) == len([name for name, _ in quantizers(model) if name.startswith("blocks.0.")])
    for name, found in tensors.items():
        quantizer, x = model.get_submodule(name), torch.cat(found)
        assert error(quantizer, x) <= 1.001 * error(full_range(quantizer, x), x), name


@pytest.mark.parametrize(
    "spec",
    [Uniform(3), Uniform(3, signed=True, zero="none"), LogSqrt2(4), AdaLog(3), AdaLog(4, shifted=True)],
    ids=repr,
)
def test_refinements_do_not_make_it_worse(spec: Spec):
    x = draw(2, 400)
    x = x.abs() / x.abs().max() if not spec.holds_negatives else x
    errors = []
    for levels in (0, 1, 5):
        quantizer = spec.build(Layout(0, 2, batched=True))
        quantizer.init_from(x)
        fit(quantizer, x, levels)
        errors.append(error(quantizer, x))
    assert errors == sorted(errors, reverse=True)


def test_a_single_point_starts_from_the_samples():
    quantizer = BitLog2(3).build(Layout(0, 1, batched=True))
    expected = BitLog2(3).build(Layout(0, 1, batched=True))
    x = draw(1, 300).abs()
    fit(quantizer, x, 1)
    expected.init_from(x)
    assert quantizer.calibrated
    assert error(quantizer, x) <= error(expected, x)


def test_values_are_spread_over_the_ranks():
    x = draw(3, 5000)
    found = spread_out(x, 11)
    assert found.shape == (3, 11)
    assert torch.equal(found, x.sort(1).values[:, [round(i * 4999 / 10) for i in range(11)]])
    assert torch.equal(found[:, [0, -1]], torch.stack([x.amin(1), x.amax(1)], 1)), "the ends are among them"
    assert spread_out(x, 5000) is x
    assert LEAST >= 100


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("levels", -1), ("levels", 21)])
def test_an_option_out_of_range_is_refused(option, value):
    with pytest.raises(QatError, match=f"TensorSearch: {option} is {value}"):
        TensorSearch(**{option: value})
