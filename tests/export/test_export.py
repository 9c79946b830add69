"""`qat export` through the command: what it writes is what the checkpoint is, and what is wrong is said in a line."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import qat
from qat.cli.main import main, run
from qat.export import export as exporting

FLOAT_STEP = "model.blocks.0.attn.qkv.weight_quant.step"


def done(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_a_run_is_exported_evaluated_and_predicts_as_before(ckpt, images, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    file = tmp_path / "tiny.safetensors"
    done("export", "--ckpt", ckpt.parent, "--output", file, "--images", images / "val")
    assert f"next: qat validate --ckpt {file}" in caplog.text
    assert "logits of 12 images equal to the bit" in caplog.text
    report = json.loads((tmp_path / "tiny.safetensors.export.json").read_text())
    assert report["different_tensors"] == []
    assert report["largest_logit_difference"] == 0
    assert report["size_mb"] == file.stat().st_size / 1e6
    assert not list(tmp_path.glob("*failed*"))
    for name, source in (("a", ckpt), ("b", file)):
        done("validate", "--ckpt", source, "--data.root", images, "--results_file", tmp_path / f"{name}.json",
              "--data.workers", 0)  # fmt: skip
        done("predict", "--ckpt", source, "--data.images", images / "val", "--output", tmp_path / f"{name}.csv",
              "--data.workers", 0)  # fmt: skip
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert all(found[0][key] == found[1][key] for key in ("top1", "top5", "loss", "images", "recipe", "size_mb"))
    tables = [list(csv.reader((tmp_path / f"{name}.csv").open())) for name in "ab"]
    assert tables[0] == tables[1]
    capsys.readouterr()
    done("describe", "--ckpt", file)
    assert " no" not in capsys.readouterr().out.split("size")[0]  # every site is ready


def test_a_packed_file_starts_a_training_and_resumes_none(ckpt, config, tmp_path, capsys):
    file = tmp_path / "tiny.safetensors"
    done("export", "--ckpt", ckpt, "--output", file)
    words = ("--model.quant_checkpoint", str(file), "--trainer.max_steps", "1", "--runs", str(tmp_path / "runs"))
    trained = run(["fit", "--config", str(config), *words])
    assert trained.trainer.global_step == 1
    said = error(capsys, "fit", "--ckpt", file, "--config", config)
    assert "holds weights only, no state of a run to resume" in said
    said = error(capsys, "fit", "--config", config, "--model.checkpoint", file)
    assert "it is a quantized checkpoint: use --ckpt" in said


def test_a_folder_for_the_hub(ckpt, images, tmp_path, capsys):
    folder = tmp_path / "hub"
    done("validate", "--ckpt", ckpt, "--data.root", images, "--results_file", tmp_path / "r.json",
          "--data.workers", 0)  # fmt: skip
    words = ("--results", f"[{tmp_path / 'r.json'}]", "--base_model", "timm/deit_tiny_patch16_224.fb_in1k")
    done("export", "--ckpt", ckpt, "--output", folder, "--format", "folder", "--rest", "float16", *words)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "model.safetensors.export.json"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "deit_tiny_patch16_224"
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["quantization_config"]["quant_method"] == "qat"
    front, text = (folder / "README.md").read_text().split("---\n")[1:]
    card = yaml.safe_load(front)
    assert card["base_model_relation"] == "quantized"
    assert card["base_model"] == "timm/deit_tiny_patch16_224.fb_in1k"
    top1 = json.loads((tmp_path / "r.json").read_text())["top1"]
    assert f"{top1:.2f} %" in text
    assert "on 12 validation images" in text
    assert "trained for 9 steps" in text
    (example,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    scope = {"images": torch.zeros(2, 3, 32, 32)}
    exec(example.replace("model.safetensors", str(folder / "model.safetensors")), scope)
    assert scope["logits"].shape == (2, 3)


def test_what_is_refused_before_any_work(ckpt, images, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    cases = [
        (("--output", tmp_path / "a.ckpt"), "give a name that ends in .safetensors"),
        (("--output", tmp_path / "none" / "a.safetensors"), "there is no folder"),
        (("--output", out, "--rest", "float8"), "rest"),
        (("--output", out, "--format", "gguf"), "format"),
        (("--output", out, "--images", tmp_path / "none"), "none"),
        (("--output", tmp_path / "f", "--format", "folder", "--results", f"[{tmp_path / 'none.json'}]"), "cannot read"),
        (("--output", tmp_path / "f", "--format", "folder", "--results", f"[{ckpt}]"), "cannot read"),
        (("--output", tmp_path, "--format", "folder"), "exists"),
        (("--output", out, "--pixels", "true"), "--pixels has no meaning for --format safetensors"),
        (("--output", out, "--results", f"[{ckpt}]"), "--results has no meaning for --format safetensors"),
        (("--output", tmp_path / "a.onnx", "--format", "onnx", "--rest", "float16"), "--rest has no meaning"),
    ]
    for words, message in cases:
        said = error(capsys, "export", "--ckpt", ckpt, *words)
        assert message in said
        assert said.count("\n") == 1
    out.write_text("mine")
    assert "exists" in error(capsys, "export", "--ckpt", ckpt, "--output", out)
    assert out.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}
    done("export", "--ckpt", ckpt, "--output", out, "--force", "true")
    assert "is packed already" in error(capsys, "export", "--ckpt", out, "--output", tmp_path / "b.safetensors")
    assert "no checkpoint" in error(
        capsys, "export", "--ckpt", tmp_path / "none.ckpt", "--output", tmp_path / "c.safetensors"
    )


def test_a_checkpoint_that_cannot_be_used(ckpt, tmp_path, capsys):
    content = torch.load(ckpt, weights_only=True)
    content["state_dict"][FLOAT_STEP].neg_()
    torch.save(content, tmp_path / "bad.ckpt")
    assert "a step of" in error(
        capsys, "export", "--ckpt", tmp_path / "bad.ckpt", "--output", tmp_path / "a.safetensors"
    )
    content["qat"]["rules"] = []
    content["state_dict"] = {name: value for name, value in content["state_dict"].items() if "_quant." not in name}
    torch.save(content, tmp_path / "float.ckpt")
    said = error(capsys, "export", "--ckpt", tmp_path / "float.ckpt", "--output", tmp_path / "a.safetensors")
    assert "is a float model" in said


def test_a_file_that_fails_its_check_has_another_name(ckpt, tmp_path, capsys, monkeypatch):
    read = qat.load

    def altered(path: Path, *args: object) -> torch.nn.Module:
        model = read(path)
        if Path(path).suffix == ".safetensors":
            model.norm.bias.data += 1
        return model

    monkeypatch.setattr(exporting.checkpoint, "load", altered)
    shutil.copy(ckpt, tmp_path / "a.ckpt")
    said = error(capsys, "export", "--ckpt", tmp_path / "a.ckpt", "--output", tmp_path / "a.safetensors")
    assert "differs in 1 tensors, the first is 'norm.bias'" in said
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "a.failed.safetensors"}


def test_an_onnx_file_is_checked_and_reported(ckpt, images, tmp_path, caplog):
    pytest.importorskip("onnx", reason="the extra 'export' is not installed")
    caplog.set_level("INFO")
    file = tmp_path / "tiny.onnx"
    done("export", "--ckpt", ckpt, "--output", file, "--format", "onnx", "--images", images / "val")
    report = json.loads((tmp_path / "tiny.onnx.export.json").read_text())
    assert report["images"] == 12
    assert report["float64_codes"] > 0
    assert report["equal_codes"] > 0.9
    assert report["products"]["MatMulIntegerToFloat"] >= 2 * 4  # onnxruntime multiplies integers in every layer
    assert "codes of 2 images are those of the checkpoint" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.onnx", "tiny.onnx.export.json"}


def test_an_onnx_file_from_a_packed_one_that_reads_pixels(ckpt, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
    done("export", "--ckpt", ckpt, "--output", tmp_path / "a.safetensors")
    packed = tmp_path / "a.safetensors"
    done("export", "--ckpt", packed, "--output", tmp_path / "a.onnx", "--format", "onnx", "--pixels", "true")
    (read,) = onnx.load(tmp_path / "a.onnx").graph.input
    assert read.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in read.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]


def test_without_the_extra_one_line_says_what_to_install(ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = error(capsys, "export", "--ckpt", ckpt, "--output", tmp_path / "a.onnx", "--format", "onnx")
    assert "pip install 'qat[export]'" in said
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_that_fails_its_check_has_another_name(ckpt, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnx", reason="the extra 'export' is not installed")
    from qat.export.graph import build

    whole = build.clean

    def altered(proto, card):
        whole(proto, card)
        (bias,) = [t for t in proto.graph.initializer if t.name == "blocks.0.attn.qkv.bias"]
        bias.raw_data = bytes(len(bias.raw_data) - 4) + b"\x00\x00\x80\x3f"  # the last bias is 1

    monkeypatch.setattr(build, "clean", altered)
    said = error(capsys, "export", "--ckpt", ckpt, "--output", tmp_path / "a.onnx", "--format", "onnx")
    assert "in float64," in said
    assert "a.failed.onnx, do not use it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.failed.onnx"]
