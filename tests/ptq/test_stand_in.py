"""What takes the place of sites: random dropping, and that a random result is not computed again in backward."""

import pytest
import torch
from torch import Tensor, nn

from qat.ptq.reconstruction import stand_in
from qat.ptq.reconstruction.stand_in import Dropped, mixed, standing_in
from qat.quantizers import Layout, Uniform, recompute_operands
from tests.ptq.test_output_search import tiny


def test_the_worked_example(monkeypatch):
    """With the random numbers 0.1, 0.7, 0.4 and 0.9."""
    monkeypatch.setattr(
        stand_in, "chosen", lambda x, keep, generator: (torch.tensor([0.1, 0.7, 0.4, 0.9]) < keep).float()
    )
    quantized, plain = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.1, 1.9, 3.2, 3.7])
    found = mixed(quantized, plain, 0.5, torch.Generator())
    assert torch.equal(found, torch.tensor([1, 1.9, 3, 3.7]))


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_values_are_exactly_those_of_either_and_as_often_as_asked(keep):
    quantized, plain = torch.randn(2, 100, 100), torch.randn(2, 100, 100)
    quantized.requires_grad_()
    plain.requires_grad_()
    found = mixed(quantized.clone(), plain, keep, torch.Generator().manual_seed(0))
    first = found == quantized
    assert bool((first | (found == plain)).all())
    assert float(first.float().mean()) == pytest.approx(keep, abs=0.02)
    found.backward(gradient := torch.randn(found.shape))
    assert torch.equal(quantized.grad, gradient * first)
    assert torch.equal(plain.grad, gradient * ~first)


def dropped(keep: float = 0.5) -> Dropped:
    quantizer = Uniform(2).build(Layout(0, 1, batched=True))
    quantizer.set_range_(torch.tensor([-1.0]), torch.tensor([1.0]))
    return Dropped(quantizer, keep, torch.Generator().manual_seed(0))


def test_in_evaluation_every_value_is_quantized():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    site = dropped().eval()
    assert torch.equal(site(x), site.quantizer(x))
    some = site.train()(x)
    share = float((some == site.quantizer(x)).float().mean())
    assert 0.3 < share < 0.7
    site.quantizer.enabled = False
    assert torch.equal(site(x), x)


def test_gradients_are_those_of_the_values_that_forward_has_drawn():
    """Products compute quantized operands again in backward; a second draw would give another gradient."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    site, seen = dropped(), list[Tensor]()

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(site(x))
            return seen[-1]

    out = recompute_operands(lambda a, b: a @ b.mT, (Seen(), x), (nn.Identity(), weight))
    out.square().sum().backward()
    assert len(seen) == 1
    assert torch.equal(weight.grad, (2 * (seen[0] @ weight.detach().mT)).mT @ seen[0])


def test_a_model_trains_on_the_values_that_forward_has_drawn():
    """The same through a whole attention: what each product multiplied by gives the gradient of its weight."""
    model = tiny()
    block = model.blocks[0]
    for quantizer in (block.attn.proj.input_quant, block.attn.proj.weight_quant):
        quantizer.set_range_(torch.full_like(quantizer.step, -1.0), torch.full_like(quantizer.step, 1.0))
    for module in block.modules():
        if module is not block.attn.proj.input_quant and hasattr(module, "enabled"):
            module.enabled = False
    site = Dropped(block.attn.proj.input_quant, 0.5, torch.Generator().manual_seed(0))
    values: list[Tensor] = []
    site.register_forward_hook(lambda module, args, out: values.append(out.detach()))
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(1))
    with standing_in(model, {"blocks.0.attn.proj.input_quant": site}):
        assert block.attn.proj.input_quant is site
        out = block.attn(x)
    assert block.attn.proj.input_quant is site.quantizer
    out.sum().backward()
    expected = values[0].flatten(0, 1).sum(0).expand_as(block.attn.proj.weight)
    torch.testing.assert_close(block.attn.proj.weight.grad, expected)
