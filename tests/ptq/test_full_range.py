"""The largest step of every tensor, on a tiny model."""

import torch

from qat.models import build_float
from qat.ptq.full_range import FullRange
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantize, quantizers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


def test_a_step_reaches_the_largest_value_of_all_images_and_all_weights():
    torch.manual_seed(0)
    model = build_float("deit_tiny_patch16_224", None, 10, TINY).eval()
    quantize(model, build_recipe("ptq4vit", [Rule("head.input_quant").to_dict()], w_bits=4, a_bits=4))
    batches = [torch.randn(2, 3, 32, 32) * size for size in (1, 3, 2)]
    seen = []
    model.blocks[0].attn.q_quant.register_forward_pre_hook(
        lambda module, args: None if module.enabled else seen.append(args[0].abs().amax((0, 2, 3)))
    )
    FullRange()(model, batches)
    peak = torch.stack(seen).amax(0)
    assert torch.equal(model.blocks[0].attn.q_quant.step, peak * 2 / 15)
    weight = model.blocks[0].attn.qkv.weight.detach()
    assert torch.equal(model.blocks[0].attn.qkv.weight_quant.step, weight.view(3, -1).abs().amax(1) * 2 / 15)
    assert all(quantizer.calibrated for _, quantizer in quantizers(model)), "also those that have no range"
