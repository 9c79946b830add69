"""Models that multiply integers: the same function as the simulation, in every family and for every quantizer."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from qat import build_float, build_recipe, calibrate, quantize
from qat.errors import QatError
from qat.integer import compare, rows, use_integers
from qat.integer.coded import Operand
from qat.integer.products import Accumulators, convolution, matrix_product
from qat.quantizers import LSQ
from qat.quantizers.terms import Term
from tests.contracts.family_cases import MODELS

RECIPES = ["uniform", "frontier", "ptq4vit", "aiqvit", "is_vit", "repq_vit", "bitlog2_half_16", "fq_vit_884"]
CASES = [(form, "vvtq") for form in MODELS] + [("deit", recipe) for recipe in RECIPES] + [("swin", "fq_vit_884")]


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@cache
def made(form: str, recipe: str) -> nn.Module:
    arch, arguments = MODELS[form]
    torch.manual_seed(0)
    model = quantize(build_float(arch, None, 10, arguments).eval(), build_recipe(recipe, w_bits=4, a_bits=4))
    calibrate(model, [images(4)])
    return model


@pytest.mark.parametrize(("form", "recipe"), CASES)
def test_every_code_is_that_of_the_simulation(form, recipe):
    """In float64 all of them; in float32 those next to a boundary may differ, which is one in a thousand at most."""
    model = made(form, recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compare(model, images(3))
    assert found["float64"]["unequal"] == 0
    assert found["float64"]["codes"] > 10_000
    assert found["logit_difference_float64"] < 1e-12  # a rounding of float64, amplified by two blocks
    for counts in found["units"].values():
        assert counts["unequal"] <= counts["codes"] / 1000
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_all_products_are_integer_and_rows_say_what_is_not():
    model = use_integers(quantized_copy("fq_vit_884"))
    with torch.no_grad():
        model(images(2))
    found = list(rows(model))
    products = [row for row in found if row.is_product]
    assert len(products) == 1 + 2 * 6 + 1
    assert all(row.integer for row in products)
    assert all(row.sums >= 1 and row.bits <= 32 for row in products)
    assert products[1].operands == "Uniform(4) x Uniform(4)"
    assert all(row.integer for row in found if row.what in ("norm", "softmax")), "FQ-ViT computes them with integers"
    assert not any(row.integer for row in found if row.what == "GELU")


def quantized_copy(recipe: str) -> nn.Module:
    import copy

    return copy.deepcopy(made("deit", recipe))


def test_what_is_in_floating_point_stays_so():
    arch, arguments = MODELS["deit"]
    left_out = [{"match": name, "spec": None} for name in ("*.attn.q_quant", "*.fc1.input_quant")]
    rules = build_recipe("vvtq", left_out, w_bits=4, a_bits=4)
    model = quantize(build_float(arch, None, 10, arguments).eval(), rules)
    calibrate(model, [images(4)])
    assert compare(model, images(3))["float64"]["unequal"] == 0
    with torch.no_grad():
        use_integers(model)(images(2))
    found = {row.name: row.integer for row in rows(model)}
    assert not found["blocks.0.attn.scores"]
    assert found["blocks.0.attn.mixed"]
    assert not found["blocks.0.mlp.fc1"]
    assert found["blocks.0.mlp.fc2"]


def term(*shape: int, factor: torch.Tensor, high: int = 100, seed: int = 0) -> Term:
    generator = torch.Generator().manual_seed(seed)
    return Term(torch.randint(-high, high, shape, generator=generator), factor.double())


def operand(*terms: Term) -> Operand:
    return Operand(list(terms), LSQ(8))


def test_a_factor_that_changes_along_the_sum_cuts_it():
    """Two heads of three channels, and an offset: two sums for the steps, and one for the offset."""
    steps = torch.tensor([0.5, 0.5, 0.5, 0.25, 0.25, 0.25])[None]
    a = operand(term(4, 6, factor=steps), Term(torch.ones(4, 6, dtype=torch.int64), torch.tensor(0.1).double()))
    b = operand(term(5, 6, factor=torch.rand(5, 1), seed=1))
    noted = Accumulators()
    torch.testing.assert_close(matrix_product(a, b, noted), a.whole() @ b.whole().mT)
    assert noted.products == 3


def test_sums_that_could_overflow_have_64_bits():
    a, b = (operand(term(n, 8, factor=torch.ones(1), high=2**20, seed=n)) for n in (2, 3))
    noted = Accumulators()
    assert torch.equal(matrix_product(a, b, noted), a.whole() @ b.whole().mT)
    assert 32 < noted.bits <= 64


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_pads_with_the_integer_zero_and_adds_no_offset_there(groups):
    steps = torch.rand(4)[None, :, None, None]
    ones = Term(torch.ones(2, 4, 6, 6, dtype=torch.int64), torch.tensor([0.3]).double())
    a = operand(term(2, 4, 6, 6, factor=steps), ones)
    b = operand(term(8, 4 // groups, 3, 3, factor=torch.rand(8, 1, 1, 1), seed=1))
    options = {"padding": (1, 1), "stride": (2, 2), "dilation": (1, 1), "groups": groups}
    expected = nn.functional.conv2d(a.whole(), b.whole(), **options)
    torch.testing.assert_close(convolution(a, b, options, Accumulators()), expected)
    if groups > 1:
        with pytest.raises(QatError, match="in groups, with a step for each channel"):
            convolution(a, operand(term(8, 2, 3, 3, factor=torch.ones(1))), {**options, "groups": 2}, Accumulators())
