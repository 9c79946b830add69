"""The float SReT: groups by hand, orders of the tokens, and what timm's users expect."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qat.errors import QatError
from qat.models import build_float, default_preprocessing
from qat.models.grouping import Grouping, evaluation_order
from qat.models.sret_float import NonProjection, RecursiveBlock, Stage
from tests.formula import f as formula
from tests.models.sret_weights import double, fill, images, tiny

P = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])


def grouped(groups: int, order: Tensor | None, attn, x: Tensor) -> Tensor:
    return Grouping(len(x), (groups, groups), order).eval()(attn, x[None], order is not None)[0]


def mean(x: Tensor) -> Tensor:
    """Attention whose scores are all equal."""
    return x.mean(1, keepdim=True).expand_as(x)


@pytest.mark.parametrize(
    ("groups", "order", "expected"),
    [
        (1, None, [3.5] * 8),
        (2, None, [1.5] * 4 + [5.5] * 4),
        (4, None, [0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.5, 6.5]),
        (8, None, [*range(8)]),
        (2, P, [3.75, 3.25, 3.25, 3.75, 3.25, 3.75, 3.25, 3.75]),
        (1, P, [3.5] * 8),
    ],
)
def test_uniform_attention_gives_the_mean_of_the_group(groups, order, expected):
    x = torch.arange(8).double()[:, None]
    torch.testing.assert_close(grouped(groups, order, mean, x)[:, 0], double(expected))


def plain_attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("groups", "order", "expected"),
    [
        (1, None, "-1.02769602 -0.78487088 -0.39814624 0.13423503 0.69904182 1.14959397 1.44480405 1.62480299"),
        (2, None, "-1.13931046 -1.03516995 -0.91251287 -0.77760608 1.35951872 1.48808321 1.60008106 1.69202212"),
        (4, None, "-1.33488077 -1.30959787 -0.28295277 -0.25552337 0.77203972 0.79907318 1.82496351 1.84919989"),
        (2, P, "-1.25999857 -0.54724141 -0.30574836 0.22558316 0.45674354 1.37384286 1.09720675 1.78281474"),
    ],
)
def test_attention_within_groups_by_hand(groups, order, expected):
    t = torch.arange(8).double()
    out = grouped(groups, order, plain_attention, torch.stack([0.5 * t - 1.5, 1 - 0.25 * t], 1))
    torch.testing.assert_close(out[:, 0], double(map(float, expected.split())), atol=1e-8, rtol=0)
    torch.testing.assert_close(out[:, 1], 0.25 - out[:, 0] / 2)


def small_stage(second: int, order: Tensor | None) -> Stage:
    block = RecursiveBlock(4, 2, 6, 0.0, Grouping(4, (2, second), order))
    stage = Stage([block], [NonProjection(4, 4) for _ in range(2)]).eval()
    assert len(fill(stage)) == 36
    return stage


@pytest.mark.parametrize(
    ("second", "order", "expected"),
    [
        (2, [2, 0, 3, 1], [-0.02354222, -1.08628239, 0.76826589, -2.06615924]),
        (2, [0, 1, 2, 3], [0.09763172, -0.68988964, 1.49484181, -2.23840512]),
        (2, None, [0.09763172, -0.68988964, 1.49484181, -2.23840512]),
        (1, [2, 0, 3, 1], [-0.12264625, -0.7936908, 1.42881026, -2.3939517]),
    ],
)
@torch.no_grad()
def test_a_stage_by_hand(second, order, expected):
    stage = small_stage(second, None if order is None else torch.tensor(order))
    out = stage(formula(16, 999).view(1, 4, 2, 2))
    torch.testing.assert_close(out[0, :, 0, 0], double(expected), atol=1e-8, rtol=0)


@torch.no_grad()
def test_every_application_in_a_stage_by_hand():
    stage, seen = small_stage(2, torch.tensor([2, 0, 3, 1])), []
    for module in (*stage.blocks, *stage.mlps):
        module.register_forward_hook(lambda _, args, out: seen.append(out[0, :2].flatten()))
    stage(formula(16, 999).view(1, 4, 2, 2))
    expected = [
        [-0.16274778, -0.68791013, 1.08760634, -1.68002387, 1.34367142, -1.14154391, 0.71616739, 0.27328569],
        [-0.43580143, -0.36687646, 0.86657374, -1.79497782, 0.85604847, -0.96310524, 1.00673096, -0.01506128],
        [-0.23455474, -0.68667985, 0.64530727, -1.89802685, 1.04978972, -1.34569345, 2.10645923, -0.51402779],
        [-0.02354222, -1.08628239, 0.76826589, -2.06615924, 1.0566153, -1.30606493, 1.85176298, -0.54674472],
    ]
    torch.testing.assert_close(torch.stack(seen), double(expected), atol=1e-8, rtol=0)


@pytest.mark.parametrize("order", [None, torch.arange(16).flip(0), evaluation_order("portable", 16, 0)])
@torch.no_grad()
def test_groups_are_a_mask(order):
    block = RecursiveBlock(12, 2, 6, 0.0, Grouping(16, (4, 4), order)).double().eval()
    x = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0)).double()
    place = torch.arange(16) if order is None else order.argsort()
    mask = (place[:, None] // 4 == place[None] // 4).expand(1, 1, 16, 16)
    torch.testing.assert_close(block.grouping(block.attn, x, True), block.attn(x, attn_mask=mask))


@pytest.mark.parametrize(
    ("index", "first", "last", "half"),
    [
        (0, [305, 551, 601, 469, 38, 408, 207, 348], [8, 110, 411, 654], 155737),
        (1, [226, 372, 713, 621, 630, 11, 239, 155], [20, 430, 341, 478], 152376),
    ],
)
def test_the_portable_order(index, first, last, half):
    order = timm.create_model("sret_tiny").stages[0].blocks[index].grouping.order
    assert order[:8].tolist() == first
    assert order[-4:].tolist() == last
    assert order[:392].sum() == half
    assert sorted(order.tolist()) == list(range(784))


@torch.no_grad()
def test_every_evaluation_order_gives_other_logits():
    modes = ["portable", "identity", 0, 1, 2]
    logits = [tiny(eval_permutation=mode)(images()) for mode in modes]
    assert torch.equal(logits[2], tiny(eval_permutation=0)(images()))
    assert all(not torch.equal(a, b) for i, a in enumerate(logits) for b in logits[:i])


@torch.no_grad()
def test_training_draws_a_new_order_in_every_call_and_follows_the_seed():
    stage = tiny(drop_path_rate=0.0).train().stages[0]
    x = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))

    def two_calls(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [stage(x), stage(x)]

    first, second = two_calls(0)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(two_calls(0), (first, second), strict=True))
    assert not torch.equal(two_calls(1)[0], first)
    stage.eval()
    assert torch.equal(*two_calls(0))


@torch.no_grad()
def test_training_shuffles_only_where_there_are_groups_to_shuffle():
    model = tiny(drop_path_rate=0.0).train()
    before = torch.get_rng_state()
    model.stages[1](torch.randn(2, 24, 2, 2, generator=torch.Generator()))  # second application: one group
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_is_not_in_a_checkpoint_and_survives_a_weight_average():
    model = tiny()
    order = model.stages[0].blocks[0].grouping.order.clone()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    assert torch.equal(average.module.stages[0].blocks[0].grouping.order, order)
    assert not any("order" in name for name, _ in (*model.named_buffers(), *model.named_parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_shuffling_is_one_graph(training):
    torch._dynamo.reset()
    grouping = Grouping(16, (4, 2), evaluation_order("portable", 16, 0)).train(training)
    explained = torch._dynamo.explain(grouping)(nn.Identity(), torch.randn(2, 16, 12), True)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1), explained.break_reasons


def test_timm_knows_the_model():
    plain = default_preprocessing("sret_tiny")
    assert (plain.size, plain.resize, plain.interpolation) == (224, 256, "bilinear")
    assert (plain.mean, plain.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not get_pretrained_cfg("sret_tiny").has_weights
    with pytest.raises(QatError, match="cannot get the pretrained weights of sret_tiny"):
        build_float("sret_tiny")


@torch.no_grad()
def test_the_head_can_be_changed_and_left_out():
    model = tiny()
    assert model.get_classifier() is model.head
    features = model.forward_features(images())
    assert features.shape == (2, 24, 2, 2)
    assert torch.equal(model.forward_head(features), model(images()))
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images()), model.forward_head(features, pre_logits=True))


def test_images_of_another_size_are_refused():
    with pytest.raises(QatError, match=r"size \(48, 48\) in a model of img_size \(32, 32\)"):
        tiny()(torch.zeros(1, 3, 48, 48))


def test_drop_path_rises_with_the_applications():
    model = timm.create_model("sret_tiny", drop_path_rate=0.1)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.005, 0.02, 0.025, 0.03, 0.035, 0.04, 0.07, 0.075, 0.08])


def test_layers_start_as_torch_starts_them_and_scalars_at_one():
    model = timm.create_model("sret_tiny")
    assert 0.06 < model.head.weight.abs().max() <= 0.0625
    assert 0.12 < model.stages[0].blocks[0].attn.qkv.weight.abs().max() <= 0.125
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    block = model.stages[1].blocks[0]
    assert [block.get_parameter(f"coefficient{i}").item() for i in range(1, 5)] == [1] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 40}, "25 tokens cannot be cut into 4 equal groups: change img_size or groups"),
        ({"groups": ((4, 0), (2, 1))}, "into 0 equal groups"),
        ({"groups": ((4, 2),)}, "differ in length"),
        ({"eval_permutation": "random"}, "eval_permutation is 'random': choose portable, identity, or an integer"),
        ({"eval_permutation": True}, "eval_permutation is True"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(QatError, match=message):
        tiny(**arguments)
