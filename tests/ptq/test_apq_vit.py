"""APQ-ViT in our reading, on tiny models."""

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.models import build_float
from qat.ptq import Observe
from qat.ptq.apq_vit import APQViT, BlockError, top_mean
from qat.ptq.full_range import FullRange
from qat.ptq.steps import Steps
from qat.recipe import build_recipe
from qat.sites.insert import quantize, quantizers, switched_off

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 4)}
SRET = {"img_size": 32, "embed_dims": (12, 24), "depths": (1, 1), "num_heads": (2, 4), "groups": ((4, 2), (2, 1))}
MODELS = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "sret": ("sret_tiny", SRET),
}


def tiny(name: str = "vit", bits: int = 3) -> nn.Module:
    arch, arguments = MODELS[name]
    torch.manual_seed(0)
    model = build_float(arch, None, 10, arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return quantize(model, build_recipe("apq_vit", w_bits=bits, a_bits=bits))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, 32, 32, generator=generator) for count in (4, 2)]


def error(model: nn.Module) -> float:
    images = torch.cat(batches())
    with torch.no_grad():
        found = model(images)
        with switched_off(q for _, q in quantizers(model)):
            exact = model(images)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_complete_and_closer_to_the_float_model_than_with_full_ranges(name):
    model, plain = tiny(name), tiny(name)
    weights = [(p, p.detach().clone()) for key, p in model.named_parameters() if not key.endswith("step")]
    APQViT(coarse=6, fine=0, images=4)(model, batches())
    Observe(observer="minmax")(plain, batches())
    assert all(quantizer.calibrated and quantizer.enabled for _, quantizer in quantizers(model))
    assert all(torch.equal(now, before) for now, before in weights)
    assert error(model) < error(plain)


def test_the_smallest_errors_of_every_image_do_not_count():
    squares = torch.tensor([[1.0, 16, 9, 4], [400, 100, 300, 200]])
    assert top_mean(squares, 0.5) == (25 + 700) / 8
    assert top_mean(squares, 0.0) == (30 + 1000) / 8
    assert top_mean(squares, 0.3) == (29 + 900) / 8


def test_the_error_is_that_of_the_output_of_a_unit_weighted_by_gradients():
    x, gradient = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0, -2, 0, 3]])
    unit = BlockError(lambda x: x + torch.tensor([0.5, 0.25, 9, 1]), x, x, gradient, dropped=0.5)
    assert unit() == (0.5**2 + 3**2) / 4  # of 0.5, 0.5, 0 and 3, one of the equal ones


def test_probabilities_keep_most_of_their_range():
    model, full = tiny(), tiny()
    Steps([FullRange()], prefix="float")(full, batches())
    APQViT(coarse=4, fine=0, prefix="float")(model, batches())
    tried = torch.tensor([0.8, 0.8 + 0.4 / 3, 1, 0.8 + 0.8 / 3, 1.2])
    for found, whole in zip(model.blocks, full.blocks, strict=True):
        parts = (found.attn.probs_quant.step / whole.attn.probs_quant.step).detach()  # of every head
        torch.testing.assert_close(parts, parts[:1].expand(3))
        assert (tried - parts[0]).abs().min() < 1e-6
        assert not found.attn.probs_quant.zero_point.any()


def test_fewer_images_are_compared_but_ranges_are_of_all():
    few, all_images = tiny(), tiny()
    first, second = batches()
    APQViT(coarse=2, fine=0, alpha=1.0, images=2)(few, [first, second * 10])
    APQViT(coarse=2, fine=0, alpha=1.0, images=2)(all_images, [first, second])
    step, plain = (m.patch_embed.proj.input_quant.step.item() for m in (few, all_images))
    assert step > 5 * plain


def test_options_out_of_range_are_refused():
    with pytest.raises(QatError, match="APQViT: dropped is 1"):
        APQViT(dropped=1.0)
    with pytest.raises(QatError, match="give less than beta"):
        APQViT(alpha=1.0, beta=1.0)
