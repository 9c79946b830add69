"""Float models: strict loading, files of every usual form, and messages that say what does not fit."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qat.errors import QatError
from qat.models import build_float, default_preprocessing, param_groups, read_weights
from qat.recipe import build_recipe
from qat.sites.insert import quantize

DEIT, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny(checkpoint=None, classes=10, arch=DEIT, fresh_head=False, **arguments) -> nn.Module:
    return build_float(arch, checkpoint, classes, {**TINY, **arguments}, fresh_head)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return tiny().state_dict()


def saved(content, path):
    torch.save(content, path)
    return path


def assert_loaded(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".pth", lambda weights: weights),
        (".pth", lambda weights: {"model": weights, "epoch": 3}),
        (".pth", lambda weights: {"module": weights}),
        (".pth", lambda weights: {f"module.{name}": value for name, value in weights.items()}),
        (".ckpt", lambda weights: {"state_dict": {f"model.{name}": value for name, value in weights.items()}}),
        (".ckpt", lambda weights: {"state_dict": {f"model.module.{name}": value for name, value in weights.items()}}),
    ],
    ids=["plain", "model", "module", "parallel", "lightning", "lightning_parallel"],
)
def test_weights_are_found_in_every_usual_wrapper(tmp_path, weights, suffix, wrap):
    assert_loaded(tiny(saved(wrap(weights), tmp_path / f"deit{suffix}")), weights)


def test_weights_load_from_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "deit.safetensors")
    assert_loaded(tiny(str(tmp_path / "deit.safetensors")), weights)


def test_without_a_checkpoint_the_weights_are_random():
    first, second = tiny(), tiny()
    assert not torch.equal(first.head.weight, second.head.weight)


def test_classes_and_arguments_reach_timm():
    model = tiny(classes=7, drop_path_rate=0.2)
    assert model.num_classes == model.head.out_features == 7
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert tiny(classes=None).num_classes == 1000


def test_missing_and_unexpected_weights_are_counted_and_named(tmp_path, weights):
    weights["blocks.0.extra"] = weights.pop("blocks.0.norm1.weight")
    path = saved(weights, tmp_path / "deit.pth")
    message = r"deit.pth does not fit the model: 1 missing \(blocks.0.norm1.weight\), 1 unexpected \(blocks.0.extra\)"
    with pytest.raises(QatError, match=message):
        tiny(path)


def test_weights_of_a_backbone_say_how_to_get_a_head(tmp_path, weights):
    torch.save({name: value for name, value in weights.items() if not name.startswith("head")}, tmp_path / "body.pth")
    with pytest.raises(QatError, match=r"has a head of 0 classes, 3 are needed: .*--model.fresh_head true"):
        build_float(DEIT, tmp_path / "body.pth", 3, TINY)


def test_a_long_list_of_missing_weights_is_cut(tmp_path, weights):
    path = saved({"head.bias": weights["head.bias"]}, tmp_path / "deit.pth")
    with pytest.raises(QatError, match=r"\d+ missing \(cls_token, pos_embed, patch_embed.proj.weight, \.\.\.\)"):
        tiny(path)


def test_weights_of_another_shape_are_named_with_both_shapes(tmp_path, weights):
    path = saved(weights, tmp_path / "deit.pth")
    message = r"31 of another shape .*'cls_token': \(1, 1, 24\) float32, not \(1, 1, 48\) float32"
    with pytest.raises(QatError, match=message):
        tiny(path, embed_dim=48)


def test_another_number_of_classes_points_to_a_fresh_head(tmp_path, weights):
    path = saved(weights, tmp_path / "deit.pth")
    with pytest.raises(QatError, match=r"a head of 10 classes.* 7 .*--model.fresh_head true"):
        tiny(path, classes=7)


def test_pretrained_weights_with_other_classes_are_refused_before_any_download():
    with pytest.raises(QatError, match=f"the weights of {DEIT} has a head of 1000 classes.*fresh_head"):
        build_float(DEIT, "pretrained", 7)


def test_a_quantized_checkpoint_points_to_ckpt(tmp_path):
    model = quantize(tiny(), build_recipe("vvtq", w_bits=4, a_bits=4))
    with pytest.raises(QatError, match=r"unexpected .*it holds quantizer steps.* use --ckpt"):
        tiny(saved(model.state_dict(), tmp_path / "deit.ckpt"))


@pytest.mark.parametrize("stored", [10, None], ids=["other_head", "no_head"])
def test_a_fresh_head_keeps_everything_else(tmp_path, weights, stored):
    if stored is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    model = tiny(saved(weights, tmp_path / "deit.pth"), classes=7, fresh_head=True)
    own = model.state_dict()
    assert own["head.weight"].shape == (7, 24)
    body = [name for name in weights if not name.startswith("head.")]
    assert all(torch.equal(own[name], weights[name]) for name in body)


def test_a_fresh_head_is_random_even_where_the_stored_one_would_fit(tmp_path, weights):
    path = saved(weights, tmp_path / "deit.pth")
    assert not torch.equal(tiny(path, fresh_head=True).head.weight, weights["head.weight"])


def test_both_heads_of_a_distilled_model_are_fresh(tmp_path):
    weights = tiny(arch=DISTILLED).state_dict()
    path = saved(weights, tmp_path / "deit.pth")
    model = tiny(path, classes=7, arch=DISTILLED, fresh_head=True)
    assert model.head.weight.shape == model.head_dist.weight.shape == (7, 24)
    assert torch.equal(model.dist_token, weights["dist_token"])
    with pytest.raises(QatError, match="a head of 10 classes"):
        tiny(path, classes=7, arch=DISTILLED)


def test_a_fresh_head_does_not_excuse_missing_weights(tmp_path, weights):
    del weights["norm.weight"]
    with pytest.raises(QatError, match=r"1 missing \(norm.weight\)"):
        tiny(saved(weights, tmp_path / "deit.pth"), classes=7, fresh_head=True)


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
def test_a_corrupt_file_is_named(tmp_path, suffix):
    path = tmp_path / f"deit{suffix}"
    for content in (b"<!DOCTYPE html><title>404</title>", b"\x00" * 100, b"PK\x03\x04 cut short", b"", b"hello"):
        path.write_bytes(content)
        with pytest.raises(QatError, match=f"cannot read the weights .*deit{suffix}") as error:
            read_weights(path)
        assert "\n" not in str(error.value), content


def test_a_truncated_file_is_named(tmp_path, weights):
    path = saved(weights, tmp_path / "deit.pth")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(QatError, match=r"cannot read the weights .*deit.pth"):
        read_weights(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"model": {"a": 1}}], ids=str)
def test_a_file_without_weights_says_so(tmp_path, content):
    with pytest.raises(QatError, match=r"deit.pth holds no table of weights"):
        read_weights(saved(content, tmp_path / "deit.pth"))


def test_a_missing_file_says_what_can_be_given(tmp_path):
    with pytest.raises(
        QatError, match=r"no file .*none.pth of weights: give a .safetensors, .pth or .ckpt file, or 'pretrained'"
    ):
        tiny(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("deit_tinny_patch16_224", "has no model 'deit_tinny_patch16_224'; similar names: deit"),
        ("zzz", "has no model 'zzz'$"),
        (f"{DEIT}.nobody", f"has no weights 'nobody' for '{DEIT}'"),
    ],
)
def test_a_name_that_timm_does_not_know_is_refused(arch, message):
    for build in (lambda: build_float(arch, None), lambda: default_preprocessing(arch)):
        with pytest.raises(QatError, match=f"timm .*{message}"):
            build()


def test_an_argument_that_timm_does_not_know_is_refused():
    with pytest.raises(QatError, match=r"model.model_args: .*'img_siz': 32.*img_siz"):
        build_float(DEIT, None, 10, {"img_siz": 32})


def test_an_argument_that_does_not_fit_the_others_is_refused():
    with pytest.raises(QatError, match=r"model\.model_args"):
        tiny(embed_dim=25)  # not a multiple of the heads


def test_preprocessing_follows_timm_and_the_image_size():
    plain = default_preprocessing(DEIT)
    assert (plain.size, plain.resize, plain.interpolation) == (224, 248, "bicubic")
    assert plain.mean == (0.485, 0.456, 0.406)
    small = default_preprocessing(DEIT, {"img_size": 32})
    assert (small.size, small.resize) == (32, 35)


def test_an_image_size_may_be_a_pair_as_in_timm():
    assert default_preprocessing(DEIT, {"img_size": [32, 32]}).size == 32


def test_only_weights_are_decayed_and_steps_have_their_own_rate():
    model = quantize(tiny(arch=DISTILLED), build_recipe("vvtq", w_bits=4, a_bits=4))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        (group["weight_decay"], group["lr"]): {names[id(p)] for p in group["params"]}
        for group in param_groups(model, 0.05, lr=1.0, step_lr=0.1)
    }
    assert groups.keys() == {(0.05, 1.0), (0.0, 1.0), (0.0, 0.1)}
    weights, others, steps = groups[0.05, 1.0], groups[0.0, 1.0], groups[0.0, 0.1]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert weights == {
        *("patch_embed.proj.weight", "head.weight", "head_dist.weight"),
        *(f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers),
    }
    assert {"pos_embed", "cls_token", "dist_token", "norm.weight", "norm.bias", "head.bias"} <= others
    assert all(
        name.endswith((".bias", "_embed", "_token", "norm1.weight", "norm2.weight", "norm.weight")) for name in others
    )
    assert steps == {name for name in names.values() if name.endswith(("_quant.step", "_quant.offset"))}
    assert weights | others | steps == set(names.values())


def test_a_float_model_has_no_group_of_steps():
    assert [group["weight_decay"] for group in param_groups(tiny(), 0.05, 1.0, 0.1)] == [0.0, 0.05]


def test_register_tokens_are_not_decayed():
    model = tiny(arch="vit_tiny_patch16_224", reg_tokens=2)
    decayed = {id(p) for group in param_groups(model, 0.05, 1.0, 0.1) if group["weight_decay"] for p in group["params"]}
    assert id(model.reg_token) not in decayed


def test_frozen_parameters_are_in_no_group():
    model = quantize(tiny(), build_recipe("lsq", w_bits=4, a_bits=4))
    frozen = (model.pos_embed, model.head.input_quant.step)
    for parameter in frozen:
        parameter.requires_grad_(False)
    kept = {id(p) for group in param_groups(model, 0.05, 1.0, 0.1) for p in group["params"]}
    assert not kept & {id(parameter) for parameter in frozen}
