"""Models that multiply integers: the same function as the simulation, in every family and for every quantizer."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qat import build_float, build_recipe, calibrate, quantize
from qat.errors import QatError
from qat.integer import compare, rows, use_integers
from qat.integer.coded import Operand
from qat.integer.modules import CodedSite
from qat.integer.products import Accumulators, convolution, matrix_product
from qat.quantizers import LSQ
from qat.quantizers.terms import Term
from tests.contracts.family_cases import MODELS

RECIPES = ["uniform", "frontier", "ptq4vit", "aiqvit", "is_vit", "repq_vit", "bitlog2_half_16", "fq_vit_884"]
CASES = [("parallel_fused", "uniform_full"), ("post_norm", "uniform_full")]
CASES += [(form, "vvtq") for form in MODELS] + [("deit", recipe) for recipe in RECIPES] + [("swin", "fq_vit_884")]


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
    """In float64 all of them; in float32 those next to a boundary may differ, which is one in a thousand at most.

    The products are integer where both operands have codes, also where a layer before them has given these.
    """
    model = made(form, recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compare(model, images(3))
    assert found["float64"]["unequal"] == 0
    assert found["float64"]["codes"] > 10_000
    assert found["logit_difference_float64"] < 1e-12  # of the last layer: its input is quantized
    for counts in found["units"].values():
        assert counts["unequal"] <= counts["codes"] / 1000
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    integer = use_integers(copy.deepcopy(model))
    with torch.no_grad():
        integer(images(1))
    floats = ["patch_embed.proj"] if recipe == "ptq4vit" else []  # which reads the image as it is
    assert [row.name for row in rows(integer) if row.is_product and not row.integer] == floats


def test_all_products_are_integer_and_rows_say_what_is_not():
    model = use_integers(copy.deepcopy(made("deit", "fq_vit_884")))
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


def test_sums_that_could_overflow_64_bits_are_cut_into_words():
    """AdaLog at 8 bits has integers of 49 bits; here both are that wide, so that each is cut."""
    exact = [[int(v) for v in torch.randint(2**48, 2**49, (2, 600), generator=torch.Generator().manual_seed(i))[0]]
             for i in (0, 1)]  # fmt: skip
    a, b = (operand(Term(torch.tensor([values]), torch.ones(1, dtype=torch.float64))) for values in exact)
    noted = Accumulators()
    found = matrix_product(a, b, noted)
    assert float(found) == pytest.approx(float(sum(x * y for x, y in zip(*exact, strict=True))), rel=1e-15)
    assert noted.products > 1
    assert noted.bits <= 64


def test_codes_are_lost_where_values_change():
    quantizer = made("deit", "uniform_full").get_submodule("blocks.0.attn.qkv.output_quant")
    x = CodedSite(quantizer)(torch.randn(2, 4, 6))
    assert type(x + 1) is torch.Tensor
    for kept in (x[0], x.split(2, 1)[1], torch.split(x, 2)[0], F.pad(x, (1, 1)), x.index_select(1, torch.tensor([2]))):
        torch.testing.assert_close(kept.operand.whole(), kept.as_subclass(torch.Tensor))
    for lost in (F.pad(x, (1, 1), value=0.5), x.view(torch.int32), x.mul_(2)):
        assert getattr(lost, "operand", None) is None
    x[0] = 9
    assert x.operand is None


def test_models_that_cannot_be_used_are_refused_by_name():
    arch, arguments = MODELS["deit"]
    fresh = quantize(build_float(arch, None, 10, arguments).eval(), build_recipe("frontier", w_bits=4, a_bits=4))
    with pytest.raises(QatError, match="are not calibrated"):
        use_integers(fresh)
    integer = use_integers(copy.deepcopy(made("deit", "uniform")))
    with pytest.raises(QatError, match="integer already"):
        use_integers(integer)
    with torch.no_grad():
        assert integer(torch.empty(0, 3, 32, 32)).shape == (0, 10)


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
