"""Swin. Shapes: B images, h x w tokens, s tokens along a side of a window, H heads, D head width, C channels."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from io import StringIO
from itertools import product
from math import ceil, sqrt
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from qat.errors import QatError
from qat.models import build_float, param_groups
from qat.ptq import InitSteps
from qat.quantizers import LSQ, Quantizer
from qat.recipe import Rule, build_recipe
from qat.sites.describe import as_table, cost, describe
from qat.sites.insert import quantize, quantizers, switched_off

SWIN_T = "swin_tiny_patch4_window7_224"
TINY = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
FLOAT_PROBS = {"match": "*.attn.probs_quant", "spec": None}


def tiny(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build_float(SWIN_T, None, 10, {**TINY, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # timm's own start hides mistakes: biases are zero
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def vvtq(*rules: dict[str, Any]) -> list[Rule]:
    return build_recipe("vvtq", rules, w_bits=4, a_bits=4)


def images(size: int | tuple[int, int] = 32) -> Tensor:
    h, w = (size, size) if isinstance(size, int) else size
    return torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(1))


def off(model: nn.Module) -> Any:
    return switched_off(quantizer for _, quantizer in quantizers(model))


# --- attention against loops ------------------------------------------------------------------------------------------


def windows(side: int, s: int, shift: int) -> Iterator[list[tuple[int, int]]]:
    """The tokens of each window in the order of its rows: a shifted grid begins ``shift`` tokens later, and wraps."""
    for top, left in product(range(0, side, s), repeat=2):
        yield [((top + i + shift) % side, (left + j + shift) % side) for i, j in product(range(s), repeat=2)]


def loop(attn: nn.Module, x: Tensor, s: int, shift: int) -> Tensor:
    """Attention of a grid (h, w, C), one window and one head at a time, each head with steps of its own."""
    H, D, table = attn.num_heads, attn.head_dim, attn.relative_position_bias_table
    out = torch.zeros_like(x)
    for tokens in windows(len(x), s, shift):
        rows = attn.qkv(torch.stack([x[token] for token in tokens]))  # (s * s, 3 * C)
        mixed = []
        for head in range(H):
            q, k, v = (
                grid(site, rows[:, (part * H + head) * D :][:, :D], head)
                for part, site in enumerate((attn.q_quant, attn.k_quant, attn.v_quant))
            )
            scores = grid(attn.scores_quant, q @ k.T / sqrt(D), head)
            for (a, (y, left)), (b, (j, i)) in product(enumerate(tokens), repeat=2):
                # place in the window, not in the image: they differ where the window wraps
                down, right = a // s - b // s, a % s - b % s
                scores[a, b] += table[(down + s - 1) * (2 * s - 1) + right + s - 1, head]
                if (y < shift) != (j < shift) or (left < shift) != (i < shift):
                    scores[a, b] -= 100  # they meet in this window only because the grid wraps
            mixed.append(grid(attn.probs_quant, scores.softmax(-1), head) @ v)
        for token, row in zip(tokens, attn.proj(torch.cat(mixed, 1)), strict=True):
            out[token] = row
    return out


def grid(site: nn.Module, x: Tensor, head: int) -> Tensor:
    """Quantize with the step of one head, as the formula says."""
    if not isinstance(site, Quantizer):
        return x
    step = site.step[head]
    return (x / step).clamp(site.spec.qmin, site.spec.qmax).round() * step


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_a_window_attends_as_a_loop_over_windows_and_heads_does(shift, quantized):
    signed, unsigned = LSQ(4, granularity="head", init="lsq"), LSQ(4, signed=False, granularity="head", init="lsq")
    sites = {"[qkv]_quant": signed, "scores_quant": signed, "probs_quant": unsigned}
    model = quantize(tiny(), [Rule(f"*.attn.{site}", spec) for site, spec in sites.items()] if quantized else [])
    InitSteps()(model, [images()])
    model.double()
    block = model.layers[0].blocks[shift // 2]
    assert block.shift_size == (shift, shift)
    x = torch.randn(2, 16, 16, 12, generator=torch.Generator().manual_seed(3)).double()
    expected = torch.stack([loop(block.attn, image, 4, shift) for image in x])
    torch.testing.assert_close(block.attend_windows(x), expected, rtol=0, atol=1e-12)
    if quantized:
        assert all(len(block.attn.get_submodule(f"{name}_quant").step.unique()) == 2 for name in ("q", "k", "v"))


@torch.no_grad()
def test_quantized_scores_do_not_let_tokens_through_that_meet_because_the_grid_wraps():
    model = quantize(tiny(), [Rule("*.attn.scores_quant", LSQ(4, init="lsq"))])
    InitSteps()(model, [images()])
    block = model.layers[0].blocks[1]
    x = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(3))
    other = x.clone()
    other[:, :2] = 0  # the first two rows are in the windows of the last two
    assert torch.equal(block.attend_windows(x)[:, -2:], block.attend_windows(other)[:, -2:])


def test_the_bias_has_the_same_gradient_with_fused_attention():
    grads = []
    for rules in ([], [FLOAT_PROBS]):
        model = quantize(tiny(), vvtq(*rules))
        with off(model):
            model(images()).square().sum().backward()
        grads.append([block.attn.relative_position_bias_table.grad for block in model.layers[0].blocks])
    for plain, fused in zip(*grads, strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rules", [[], [FLOAT_PROBS]], ids=["written out", "fused"])
def test_it_trains_under_autocast(rules):
    model = quantize(tiny(), vvtq(*rules))
    InitSteps()(model, [images()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images()).float().square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_a_weight_average_of_equal_weights_is_the_model():
    model = quantize(tiny(), vvtq())
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9999), use_buffers=True)  # as Lightning's
    for _ in range(3):
        average.update_parameters(model)
    with off(model), off(average):
        torch.testing.assert_close(average(images()), model(images()), rtol=0, atol=1e-5)


# --- options and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"always_partition": True, "window_size": 8},  # the second stage is one window, and shifted
        {"window_size": 8},
        {"window_size": (4, 2)},
        {"img_size": (36, 24)},
        {"head_dim": 5},
        {"qkv_bias": False},
        {"depths": (1, 1, 1), "num_heads": (2, 4, 8), "window_size": (4, 2, 3)},
        {"global_pool": ""},
    ],
    ids=str,
)
@torch.no_grad()
def test_an_option_of_timm_is_reproduced(arguments):
    model = tiny(**arguments)
    x = images(arguments.get("img_size", 32))
    expected = model(x)
    quantize(model, vvtq())
    with off(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "place", ["patch_embed", "layers.0", "layers.1.downsample", "layers.0.blocks.1", "layers.1.blocks.0.attn"]
)
def test_a_part_that_is_not_timms_is_refused_by_name(place):
    model = tiny()
    part = model.get_submodule(place)
    part.__class__ = type("Other", (kind := type(part),), {})
    with pytest.raises(QatError, match=f"^{place} is a Other: only timm's {kind.__name__} is reproduced"):
        quantize(model, vvtq())


def test_a_mask_for_every_size_of_image_is_refused():
    with pytest.raises(QatError, match=r"layers\.0\.blocks\.0: strict_img_size: false is not reproduced"):
        quantize(tiny(strict_img_size=False), vvtq())


def test_position_biases_and_steps_are_not_decayed():
    model = quantize(tiny(), vvtq())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {}
    for group in param_groups(model, 0.05, lr=1e-3, step_lr=1e-4):
        rates.update({names[id(parameter)]: (group["weight_decay"], group["lr"]) for parameter in group["params"]})
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        if name.endswith(("_quant.step", "_quant.offset")):
            assert rate == (0, 1e-4)
        else:
            plain = "norm" in name or name.endswith((".bias", "relative_position_bias_table"))
            assert rate == (0 if plain else 0.05, 1e-3)
    assert sum(name.endswith("bias_table") for name in rates) == 4


def test_the_table_merges_stages_and_blocks_and_its_names_are_rules():
    model = quantize(tiny(depths=(2, 2, 2), num_heads=(1, 2, 4)), vvtq())
    out = StringIO()
    Console(file=out, width=80, color_system=None).print(as_table(describe(model)))
    lines = out.getvalue().splitlines()
    shown = [line.split()[:4] for line in lines if ".mlp.fc1.weight_quant" in line]
    assert shown == [["layers.*.mlp.fc1.weight_quant", "6", "LSQ", "4"]]
    assert sum(fnmatchcase(name, shown[0][0]) for name, _ in quantizers(model)) == 6
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()


def test_windows_that_are_padded_are_counted_whole():
    plain, padded = (cost(quantize(tiny(window_size=s), vvtq()), 32).float_bit_operations for s in (4, 5))
    more = 0
    for side, C in ((16, 12), (8, 24)):
        N = ceil(side / 5) ** 2 * 25  # tokens of all windows
        more += 2 * ((N - side**2) * 4 * C**2 + (N * 25 - side**2 * 16) * 2 * C)
    assert padded - plain == more * 32 * 32
