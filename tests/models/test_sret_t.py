"""SReT-T in its full size: logits of the official code on formula weights, float and quantized; size and cost."""

import copy
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn

from qat.models import param_groups
from qat.models.sret_float import SReT
from qat.recipe import build_recipe
from qat.sites.describe import cost
from qat.sites.insert import quantize, quantizers, weight_sites
from tests.formula import f as formula
from tests.models.sret_weights import double, fill


@cache
def _full(*groups: tuple[int, int]) -> SReT:
    model = timm.create_model("sret_tiny", eval_permutation="identity", **({"groups": groups} if groups else {})).eval()
    fill(model)
    return model


def full(*groups: tuple[int, int]) -> SReT:
    return copy.deepcopy(_full(*groups))


@cache
def formula_images() -> Tensor:
    return 2 * formula(2 * 3 * 224 * 224, 999).view(2, 3, 224, 224)


def assert_logits(logits: Tensor, expected: list[float], atol: float = 1e-8) -> None:
    torch.testing.assert_close(logits[0, : len(expected)], double(expected), atol=atol, rtol=0)


def test_the_formula_is_the_one_of_the_fixtures():
    expected = torch.tensor([-0.34425902, -0.75537124, 0.84590786, 0.4595783])
    torch.testing.assert_close(formula(4, 5).float(), expected)
    ranks = fill(full())
    assert len(ranks) == 387
    known = {
        "head.bias": 0, "head.weight": 1, "norm.bias": 2, "patch_embed.conv1.weight": 17, "pos_embed": 26,
        "transformers.0.blocks.0.attn.proj_q.weight": 32, "transformers.1.blocks.12.attn.proj_q.weight": 140,
    }  # fmt: skip
    assert {name: ranks[name] for name in known} == known


def reorder(model: nn.Module, order: Tensor | None) -> None:
    for block in model.stages[0].blocks:
        block.grouping.order = order


FLOAT = {
    "identity": [-2.01641888, 0.57544778, -0.15935934, -0.11592360, 0.54656476],
    "reversal": [-2.01641888, 0.57544778, -0.15935934, -0.11592360, 0.54656476],
    "evens_then_odds": [-2.01380737, 0.57473908, -0.14955115, -0.10686805, 0.54460176],
    "portable": [-2.01273472, 0.56707651, -0.16028278, -0.11721466, 0.54861801],
    "unsliced": [-2.06026966, 0.59346858, -0.19829364, -0.08118682, 0.57167478],
}


@pytest.mark.parametrize("mode", FLOAT)
@torch.no_grad()
def test_float_logits_are_those_of_the_official_code(mode):
    model = full((1, 1), (1, 1), (1, 1)) if mode == "unsliced" else full()
    if mode == "portable":
        model.set_eval_permutation("portable")
    if mode == "reversal":
        reorder(model, torch.arange(784).flip(0))
    if mode == "evens_then_odds":
        reorder(model, torch.cat([torch.arange(0, 784, 2), torch.arange(1, 784, 2)]))
    assert_logits(model(formula_images()), FLOAT[mode])


@torch.no_grad()
def test_means_of_the_stages_are_those_of_the_official_code():
    model, means = full(), {}
    parts = ["patch_embed", "stages.0", "pools.0", "stages.1", "pools.1", "stages.2", "norm"]
    for part in parts:
        model.get_submodule(part).register_forward_hook(
            lambda _, args, out, part=part: means.update({part: out.abs().mean().item()})
        )
    model(formula_images())
    expected = [0.18848005, 2.85981368, 1.97052871, 6.16067888, 4.93688846, 7.23049086, 0.70093844]
    assert means == pytest.approx(dict(zip(parts, expected, strict=True)), abs=2e-8)


def official_step(values: Tensor, bits: int) -> Tensor:
    return 2 * values.abs().mean(1) / (2 ** (bits - 1) - 1) ** 0.5


def start_as_the_official_code(quantizer: nn.Module, args: tuple[Tensor]) -> None:
    """In the first application: later ones find the step there. Earlier sites quantize already."""
    if quantizer.step.isnan().any():
        quantizer.step.copy_(official_step(quantizer.grouped(args[0]), quantizer.spec.width))
        if quantizer.offset is not None:
            quantizer.offset.zero_()


QUANTIZED = {
    4: (
        [-0.82988415, 0.04754187, 0.02918432, -0.55538283, 0.66696249],
        [-0.98217006, -0.45315574, -0.00427243, -0.47001043, 0.57236063],
    ),
    2: ([-0.99306205, 0.02674794], [-0.70649309, -0.23736890]),
}
STEPS = {
    "head.input_quant": 0.11953227,
    "patch_embed.conv1.input_quant": 0.17621550,
    "stages.0.blocks.0.attn.probs_quant": 0.00771356,
    "stages.2.blocks.0.mlp.fc2.input_quant": 0.27255626,
}


@pytest.mark.parametrize("bits", QUANTIZED)
@torch.no_grad()
def test_quantized_logits_are_those_of_the_official_code(bits):
    model = quantize(full(), build_recipe("vvtq", w_bits=bits, a_bits=bits)).double()
    for site in weight_sites(model):
        site.quantizer.step.copy_(official_step(site.quantizer.grouped(site.weight), site.quantizer.spec.width))
    for _, quantizer in quantizers(model):
        if quantizer.layout.batched:
            quantizer.register_forward_pre_hook(start_as_the_official_code)
    first, shifted = QUANTIZED[bits]
    assert_logits(model(formula_images()), first)
    if bits == 4:
        steps = {name: model.get_submodule(name).step.item() for name in STEPS}
        assert steps == pytest.approx(STEPS, abs=1e-8)
    for _, quantizer in quantizers(model):
        if quantizer.offset is not None:
            quantizer.offset.fill_(-0.17)
    # at 2 bits one number of the fixture is 3.2e-6 off and its neighbour is not; another code would move both by 5e-4
    assert_logits(model(formula_images()), shifted, atol=1e-8 if bits == 4 else 4e-6)


def test_every_part_has_the_published_size():
    model = timm.create_model("sret_tiny")

    def count(part: nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    assert count(model) == 4_755_979
    assert count(model.patch_embed) == 56_640
    assert model.pos_embed.numel() == 50_176
    assert [count(stage) for stage in model.stages] == [127_068, 1_257_380, 3_003_363]
    assert [count(stage.blocks[0]) for stage in model.stages] == [46_634, 184_912, 736_925]
    assert [count(stage.mlps[0]) for stage in model.stages] == [8_450, 33_282, 132_098]
    assert [count(pool) for pool in model.pools] == [1_280, 2_560]
    assert count(model.norm) + count(model.head) == 257_512
    assert [len(stage.mlps) for stage in model.stages] == [4, 10, 6]


def test_a_shared_block_is_stored_once():
    names = set(timm.create_model("sret_tiny").state_dict())
    assert len(names) == 350  # distinct tensors of the official model with fused projections
    assert {
        "pos_embed", "patch_embed.conv1.weight", "patch_embed.bn3.running_var", "pools.1.conv.bias", "norm.weight",
        "head.bias", "stages.1.blocks.4.attn.qkv.bias", "stages.1.blocks.4.attn.proj.weight",
        "stages.2.blocks.2.mlp.fc2.weight", "stages.2.blocks.2.coefficient4", "stages.2.mlps.5.mlp.fc1.weight",
        "stages.0.mlps.3.norm1.weight", "stages.0.mlps.0.coefficient2",
    } <= names  # fmt: skip


def test_the_inventory_is_the_published_one():
    model = quantize(timm.create_model("sret_tiny"), build_recipe("vvtq", w_bits=3, a_bits=4))
    weights = [(site.quantizer, site.weight.numel()) for site in weight_sites(model)]
    for bits, steps, values in ((3, 100, 4_356_096), (8, 6, 315_616)):
        assert sum(q.layout.groups for q, _ in weights if q.spec.width == bits) == steps
        assert sum(numel for q, numel in weights if q.spec.width == bits) == values
    activations = [q.spec for _, q in quantizers(model) if q.layout.batched]
    assert len(activations) == 126
    kinds = [(spec.width, spec.signed, spec.offset) for spec in activations]
    wanted = {(4, True, False): 80, (4, False, False): 10, (4, False, True): 30, (8, True, False): 6}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == wanted


def test_both_applications_cost():
    model = quantize(timm.create_model("sret_tiny"), [])
    macs = {"stem": 97.54, "linear": 143.70 + 359.26 + 215.71, "attention": 98.34 + 61.47 + 7.38}
    macs |= {"non_projection": 25.69 + 64.23 + 38.54, "pools": 0.34, "head": 0.256}
    assert cost(model, 224).float_bit_operations / 32**2 / 1e6 == pytest.approx(1112.44, abs=0.01)
    assert sum(macs.values()) == pytest.approx(1112.44, abs=0.05)
    whole = quantize(timm.create_model("sret_tiny", groups=[(1, 1)] * 3), [])
    assert cost(whole, 224).float_bit_operations / 32**2 / 1e6 == pytest.approx(1366, abs=1)


def test_undecayed_are_vectors_and_the_embedding():
    (_, kept) = param_groups(timm.create_model("sret_tiny"), 0.05, 1.0, 0.1)[::-1]
    groups = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in (_, kept)}
    assert groups[0.0] == 34_091 + 50_176
    assert sum(groups.values()) == 4_755_979
