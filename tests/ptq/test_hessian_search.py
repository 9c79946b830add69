"""What the search of PTQ4ViT tries, and on which rows, on a tiny model."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qat.models import build_float
from qat.ptq.gradient_product import GradientProduct
from qat.ptq.hessian_search import HessianSearch, multiples
from qat.ptq.steps import Steps
from qat.quantizers import Layout, Uniform
from qat.recipe import build_recipe
from qat.sites.insert import quantize, quantizers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = build_float("deit_tiny_patch16_224", None, 10, TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return quantize(model, build_recipe("ptq4vit", w_bits=4, a_bits=4))


def batches() -> Sequence[Tensor]:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(4)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[GradientProduct]:
    """Every product that is searched."""
    seen: list[GradientProduct] = []
    search = GradientProduct.search_
    monkeypatch.setattr(GradientProduct, "search_", lambda self, rounds: (seen.append(self), search(self, rounds)))
    return seen


def test_multiples_begin_at_alpha_and_end_before_beta():
    quantizer = Uniform(8, signed=True, zero="none").build(Layout(1, 2, batched=True))
    table = multiples(quantizer, torch.tensor([-127.5, -1.0]), torch.tensor([3.0, 255.0]), 100, 0.01, 1.2)
    assert table["step"].shape == (100, 2)
    expected = torch.tensor([0.01, 0.01 + 83 * 0.0119, 1.2 - 0.0119])  # factor 1 is none of them
    torch.testing.assert_close(table["step"][[0, 83, 99]], expected[:, None] * torch.tensor([1.0, 2.0]))


def test_every_product_is_searched_on_all_rows_that_have_a_gradient(products):
    Steps([HessianSearch(candidates=4, rounds=1)], prefix="float")(tiny(), batches())
    block = {"qkv": (6 * 17, 72), "scores": (6, 3, 17, 17), "mix": (6, 3, 17, 8), "proj": (6 * 17, 24),
             "fc1": (6 * 17, 96), "fc2": (6 * 17, 24)}  # fmt: skip
    last = block | {"proj": (6, 24), "fc1": (6, 96), "fc2": (6, 24)}  # the class token of every image
    expected = [(6, 16, 24), *block.values(), *last.values(), (6, 10)]
    assert [tuple(product.gradients[0].shape) for product in products] == expected
    assert all(product.gradients[0].abs().max() == 1 for product in products)


def test_fewer_rows_are_those_of_the_same_gradients(products):
    """The class token is among them."""
    model = tiny()
    for rows in (6304, 2 * 5):
        Steps([HessianSearch(candidates=2, rounds=1, rows=rows)], prefix="float")(tiny(), batches())
    full, few = products[5], products[5 + len(products) // 2]  # fc1 of the first block
    rows = len(few.gradients[0])
    assert 2 * 5 <= rows < len(full.gradients[0])  # whole tokens of every image
    x, weight = few.left.operand.tensors[0], model.blocks[0].mlp.fc1.weight
    assert x.shape == (rows, 24)
    everywhere = full.left.operand.tensors[0]
    rows_of = [int((everywhere == row).all(1).nonzero()[0]) for row in x]
    torch.testing.assert_close(few.targets[0], everywhere[rows_of] @ weight.mT)
    expected = full.gradients[0][rows_of]
    torch.testing.assert_close(few.gradients[0], expected / expected.abs().max())
    assert 0 in rows_of


def test_a_second_call_does_not_remember_the_first():
    search = HessianSearch(candidates=4, rounds=1)
    first, second = tiny(), tiny()
    Steps([search])(first, batches())
    Steps([search])(second, batches())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert all(quantizer.calibrated for _, quantizer in quantizers(second))
