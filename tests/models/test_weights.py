"""Files of weights as people have them: which table is read, what names lose, and what is logged."""

from __future__ import annotations

import argparse
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qat.errors import QatError
from qat.models import build_float, read_weights

DEIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}


def deit(checkpoint=None, classes=10, key=None, **arguments) -> nn.Module:
    return build_float(DEIT, checkpoint, classes, {**TINY, **arguments}, checkpoint_key=key)


def swin(checkpoint=None, classes=10, **arguments) -> nn.Module:
    return build_float(SWIN, checkpoint, classes, {**SMALL, **arguments})


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return deit().state_dict()


def moved(weights, by=1.0):
    return {name: value + by for name, value in weights.items()}


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def saved(content, path):
    torch.save(content, path)
    return path


def assert_loaded(model, weights):
    own = model.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "model.",
        "backbone.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.backbone.module.",
    ],
)
def test_prefixes_are_removed_however_they_are_nested(tmp_path, weights, prefix):
    assert_loaded(deit(saved({"state_dict": prefixed(weights, prefix)}, tmp_path / "a.pth")), weights)


def test_a_block_that_was_compiled_for_itself(tmp_path, weights):
    compiled = {name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in weights.items()}
    assert_loaded(deit(saved(compiled, tmp_path / "a.pth")), weights)


def test_a_prefix_of_some_names_is_refused(tmp_path, weights):
    mixed = prefixed(weights, "module.") | {"norm.weight": weights["norm.weight"]}
    with pytest.raises(QatError, match=r"a.pth: 'norm.weight' lacks the prefix 'module.'"):
        deit(saved(mixed, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model": w, "args": argparse.Namespace(lr=1e-3), "epoch": 3, "optimizer": {"state": {}}},
        lambda w: {"model_state_dict": w, "loss": 0.1},
        lambda w: {"model": {"state_dict": w}},
        lambda w: {"state_dict": {"module": prefixed(w, "module.")}},
        lambda w: {"net": w},
        lambda w: prefixed(w, "module.") | {"n_averaged": torch.tensor(7)},
    ],
    ids=["namespace", "model_state_dict", "nested", "nested_module", "another_name", "averaged_model"],
)
def test_wrappers_of_other_projects(tmp_path, weights, wrap):
    assert_loaded(deit(saved(wrap(weights), tmp_path / "a.pth.tar")), weights)


@pytest.mark.parametrize("name", ["a.PTH", "a.bin", "a.pt", "a.Pth.Tar", "a.weights"])
def test_any_suffix_is_a_file_of_torch(tmp_path, weights, name):
    assert_loaded(deit(saved(weights, tmp_path / name)), weights)


def test_safetensors_in_capitals(tmp_path, weights):
    save_file(weights, tmp_path / "a.SAFETENSORS")
    assert_loaded(deit(tmp_path / "a.SAFETENSORS"), weights)


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "teacher"])
def test_averaged_weights_are_taken_where_there_are_some_and_a_key_chooses(tmp_path, weights, averaged, caplog):
    raw = {"teacher": "student"}.get(averaged, "model")
    path = saved({raw: moved(weights), averaged: prefixed(weights, "module."), "epoch": 1}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        assert_loaded(deit(path), weights)
    (line,) = [line for line in caplog.messages if "a.pth" in line]
    assert line == f"{path} holds {raw}, {averaged}: took '{averaged}' (averaged weights); model.checkpoint_key chooses"
    assert_loaded(deit(path, key=raw), moved(weights))


def test_an_average_inside_a_wrapper(tmp_path, weights):
    path = saved({"model": moved(weights), "ema": {"module": weights, "updates": 5}}, tmp_path / "a.pth")
    assert_loaded(deit(path), weights)


def test_a_single_table_is_no_choice(tmp_path, weights, caplog):
    with caplog.at_level(logging.INFO):
        deit(saved({"model": weights, "model_ema": None}, tmp_path / "a.pth"))
    assert caplog.messages == []


def test_a_key_that_is_not_there(tmp_path, weights):
    path = saved({"model": weights, "epoch": 1}, tmp_path / "a.pth")
    with pytest.raises(QatError, match=r"model.checkpoint_key is 'ema', but .*a.pth holds model: choose one"):
        deit(path, key="ema")
    with pytest.raises(QatError, match=r"checkpoint_key is 'ema', but model.checkpoint is no file"):
        deit(None, key="ema")


def test_tables_of_unknown_names_need_a_key(tmp_path, weights):
    path = saved({"a": weights, "b": moved(weights)}, tmp_path / "a.pth")
    with pytest.raises(QatError, match=r"several tables, a, b: choose one with model.checkpoint_key"):
        deit(path)
    assert_loaded(deit(path, key="b"), moved(weights))


def test_what_is_no_tensor_is_named(tmp_path, weights):
    path = saved({"model": {**weights, "lr": 0.1}}, tmp_path / "a.pth")
    with pytest.raises(QatError, match=r"'lr' in 'model' is a float, not a tensor"):
        deit(path)


def test_a_whole_module_and_a_folder_say_what_to_do(tmp_path):
    with pytest.raises(QatError, match=r"holds a whole torch.nn.modules.linear.Linear: torch.save its state_dict"):
        read_weights(saved(nn.Linear(2, 2), tmp_path / "a.pth"))
    with pytest.raises(QatError, match=r"'model' is a torch.nn.modules.linear.Linear; torch.save the state_dict"):
        read_weights(saved({"model": nn.Linear(2, 2)}, tmp_path / "a.pth"))
    with pytest.raises(QatError, match=r"is a folder: give a file of weights, or .*local-dir:"):
        read_weights(tmp_path)


def test_weights_of_another_image_size_are_resampled_and_logged(tmp_path, weights, caplog):
    path = saved(weights, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "qat"):
        model = deit(path, img_size=64)
    assert model.pos_embed.shape == (1, 65, 24)
    assert torch.equal(model.pos_embed[:, 0], weights["pos_embed"][:, 0])  # the class token stays
    assert caplog.messages == [f"{path}: pos_embed resampled from (1, 17, 24) to (1, 65, 24)"]
    body = [name for name in weights if name != "pos_embed"]
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in body)


def test_weights_of_another_window_are_resampled_in_swin(tmp_path, caplog):
    weights = swin().state_dict()
    with caplog.at_level(logging.INFO, "qat"):
        model = swin(saved(weights, tmp_path / "a.pth"), img_size=64, window_size=8)
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.shape == (225, 1)
    assert sum("resampled from (49," in line for line in caplog.messages) == 3


def test_the_old_layout_of_swin_is_renamed_and_its_buffers_left_out(tmp_path, caplog):
    weights = swin().state_dict()
    old = {
        name.replace("head.fc.", "head.").replace("layers.1.down", "layers.0.down"): v for name, v in weights.items()
    }
    old |= {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long),
        "layers.1.blocks.1.attn_mask": torch.zeros(4, 16, 16),
    }
    with caplog.at_level(logging.INFO, "qat"):
        assert_loaded(swin(saved({"model": old, "config": argparse.Namespace()}, tmp_path / "a.pth")), weights)
    assert any("timm renamed 5 weights" in line for line in caplog.messages)
    assert any("left out 2 tensors that the model does not have" in line for line in caplog.messages)
    model = build_float(SWIN, tmp_path / "a.pth", 7, SMALL, fresh_head=True)
    assert model.head.fc.weight.shape == (7, 24)
    assert torch.equal(model.norm.weight, weights["norm.weight"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm.weight", float("nan"), "1 of the 24 numbers in 'norm.weight' are not finite"),
        ("blocks.1.mlp.fc1.weight", float("inf"), "1 of the 2304 numbers in 'blocks.1.mlp.fc1.weight' are not finite"),
    ],
)
def test_numbers_that_are_not_finite_are_named(tmp_path, weights, name, value, message):
    weights[name].view(-1)[3] = value
    with pytest.raises(QatError, match=rf"a.pth: {message}: the training that wrote them had diverged"):
        deit(saved(weights, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to(torch.complex64), r"1 of another .*'norm.bias': \(24,\) complex64, not \(24,\) float32"),
        (lambda v: v.long(), r"'norm.bias': \(24,\) int64, not \(24,\) float32"),
        (lambda v: v > 0, r"'norm.bias': \(24,\) bool"),
        (lambda v: v.to_sparse(), r"1 of another shape or type \('norm.bias'"),
        (lambda v: v[:23], r"'norm.bias': \(23,\) float32, not \(24,\) float32"),
        (lambda v: v.view(1, 24), r"'norm.bias': \(1, 24\)"),
    ],
    ids=["complex", "integer", "bool", "sparse", "shorter", "more_axes"],
)
def test_numbers_of_another_kind_or_shape_are_named(tmp_path, weights, change, message):
    weights["norm.bias"] = change(weights["norm.bias"])
    with pytest.raises(QatError, match=message):
        deit(saved(weights, tmp_path / "a.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width_are_loaded(tmp_path, weights, dtype):
    path = saved({name: value.to(dtype) for name, value in weights.items()}, tmp_path / "a.pth")
    assert_loaded(deit(path), {name: value.to(dtype).float() for name, value in weights.items()})


def test_a_layer_that_the_model_lacks_is_not_dropped(tmp_path, weights):
    weights["pre_logits.fc.weight"] = torch.ones(24, 24)  # timm drops it
    with pytest.raises(QatError, match=r"1 unexpected \(pre_logits.fc.weight\)"):
        deit(saved(weights, tmp_path / "a.pth"))


def test_names_of_vvtq_point_to_the_converter(tmp_path, weights):
    split = {name.replace(".attn.qkv.", ".attn.proj_q."): value for name, value in weights.items()}
    with pytest.raises(QatError, match=r"names of VVTQ: translate the file with `qat convert-official`"):
        deit(saved(split, tmp_path / "a.pth"))
