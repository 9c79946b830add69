"""Tiny models of every family, for the promises of tests/contracts and for tests of calibration."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import is_model
from timm.models.vision_transformer import ParallelScalingBlock

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
DEIT, DISTILLED, VIT = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"
SWIN = "swin_tiny_patch4_window7_224"
TINY_SRET = {"img_size": 32, "embed_dims": (12, 24), "depths": (1, 2), "num_heads": (2, 4), "groups": ((4, 2), (2, 1))}
# One line for each form of each family: timm name and arguments. A new family adds its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": (DEIT, TINY),
    "distilled": (DISTILLED, TINY),
    "no_bias": (VIT, {**TINY, "qkv_bias": False, "proj_bias": False}),
    "query_key_norm": (VIT, {**TINY, "qk_norm": True}),
    "inner_norms": (VIT, {**TINY, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "layer_scale": (VIT, {**TINY, "init_values": 0.5}),
    "average_pool": (VIT, {**TINY, "global_pool": "avg", "class_token": False, "fc_norm": True}),
    "registers": (VIT, {**TINY, "reg_tokens": 4, "no_embed_class": True}),
    "stochastic_depth": (VIT, {**TINY, "drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", TINY),
    "siglip": ("vit_base_patch16_siglip_224", TINY),
    "dinov2": ("vit_giant_patch14_reg4_dinov2", {**TINY, "dynamic_img_size": True}),
    "aimv2": ("aimv2_large_patch14_224", TINY),
    "post_norm": ("vit_base_patch16_rpn_224", TINY),
    "parallel_scaling": ("vit_base_patch16_xp_224", TINY),
    "parallel_fused": (VIT, {**TINY, "block_fn": partial(ParallelScalingBlock, fuse_out_proj=True), "init_values": 1}),
    "parallel_things": ("vit_base_patch16_18x2_224", TINY),
    "eva": ("eva_giant_patch14_224", TINY),
    "eva_post_norm": ("eva02_enormous_patch14_clip_224", TINY),
    "eva02": ("eva02_tiny_patch14_224", TINY),
    "eva02_separate": ("eva02_base_patch14_224", TINY),
    "dinov3": ("vit_small_plus_patch16_dinov3_qkvb", TINY),
    "rope_mixed": ("vit_small_patch16_rope_mixed_ape_224", TINY),
    "perception": ("vit_pe_core_base_patch16_224", TINY),
    "grouped_queries": ("vit_base_patch16_sapiens2", {**TINY, "embed_dim": 32, "num_heads": 4, "num_kv_heads": (4, 2)}),
    "beit": ("beit_base_patch16_224", TINY),
    "swin": (SWIN, TINY_SWIN),
    "swin_padded": (SWIN, {**TINY_SWIN, "window_size": 5, "head_dim": 4, "qkv_bias": False}),
    "sret": ("sret_tiny", TINY_SRET),
}
MODELS = {name: model for name, model in MODELS.items() if is_model(model[0])}  # old versions of timm lack some
# One block of each kind: its name and the shape of its input. The other models differ outside the block.
BLOCKS: dict[str, tuple[str, tuple[int, ...]]] = {
    "deit": ("blocks.0", (2, 17, 24)),
    "inner_norms": ("blocks.0", (2, 17, 24)),
    "layer_scale": ("blocks.0", (2, 17, 24)),
    "swin": ("layers.0.blocks.1", (2, 16, 16, 12)),  # the windows of odd blocks are shifted
    "swin_padded": ("layers.0.blocks.1", (2, 16, 16, 12)),
    "sret": ("stages.0.blocks.0", (2, 16, 12)),
}
# Matrix products of each model: embedding, six in each block, between the stages, head.
PRODUCTS = {"distilled": 1 + 2 * 6 + 2, "swin": 1 + 4 * 6 + 1 + 1, "swin_padded": 1 + 4 * 6 + 1 + 1}
PRODUCTS["sret"] = 3 + 2 * 3 * (6 + 2) + 1 + 1  # stem; each of three blocks, and an MLP, twice; pool; head
PRODUCTS |= dict.fromkeys(("aimv2", "dinov3"), 1 + 2 * 7 + 1)  # gate and value have a layer each
PRODUCTS |= dict.fromkeys(("siglip", "perception"), 1 + 2 * 6 + 7 + 1)  # the pool has five layers and an attention
PRODUCTS |= {"parallel_scaling": 1 + 2 * 5 + 1, "parallel_fused": 1 + 2 * 4 + 1, "parallel_things": 1 + 2 * 12 + 1}
PRODUCTS |= {"eva02_separate": 1 + 2 * 9 + 1, "grouped_queries": 1 + 2 * 8 + 1}  # q, k and v have a layer each
VIT_PRODUCTS = 1 + 2 * 6 + 1
TWICE = {"sret": "stages.*.blocks.*"}  # modules that a model applies twice
