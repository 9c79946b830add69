"""Names of models: timm's, folders, repositories of the hub; and what happens without a network."""

from __future__ import annotations

import json
import socket
import time

import pytest
import torch
from safetensors.torch import save_file

from qat import checkpoint
from qat.errors import QatError
from qat.models import build_float, default_preprocessing
from qat.models.arch import find_architecture
from qat.models.hub import answers, quickly, source_of
from qat.training.options import ModelOptions
from qat.training.student import build_student

DEIT = "deit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No host answers, as without a network."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path):
    """A model as timm's save_for_hf writes it, for 32 pixels and 10 classes."""
    torch.manual_seed(0)
    weights = build_float(DEIT, None, 10, {**TINY, "img_size": 32}).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    cfg = {
        "input_size": [3, 32, 32], "fixed_input_size": True, "num_classes": 10, "classifier": "head", "crop_pct": 0.8,
        "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "first_conv": "patch_embed.proj",
    }  # fmt: skip
    config = {"architecture": DEIT, "num_classes": 10, "model_args": TINY, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, weights


def test_a_folder_gives_model_weights_and_preprocessing(folder):
    path, weights = folder
    arch = f"local-dir:{path}"
    model = build_float(arch)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    plain = default_preprocessing(arch)
    assert (plain.size, plain.resize, plain.interpolation, plain.mean) == (32, 40, "bilinear", (0.5, 0.5, 0.5))
    assert build_float(arch, None).num_classes == 10
    assert build_float(arch, str(path / "model.safetensors"), 7, fresh_head=True).num_classes == 7
    with pytest.raises(QatError, match="a head of 10 classes, 7 are needed"):
        build_float(arch, num_classes=7)


def test_a_checkpoint_of_it_needs_no_folder(folder, tmp_path):
    arch = f"local-dir:{folder[0]}"
    student = build_student(ModelOptions(arch=arch, checkpoint="pretrained", num_classes=10))
    assert student.card.arch == DEIT
    assert student.card.model_args == {**TINY, "img_size": 32}
    state = {f"model.{name}": value for name, value in student.model.state_dict().items()}
    torch.save({"qat": student.card.to_dict(), "state_dict": state}, tmp_path / "a.ckpt")
    loaded = checkpoint.load(tmp_path / "a.ckpt").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in folder[1].items())


def test_a_folder_without_a_description_is_named(tmp_path):
    with pytest.raises(QatError, match=r"'local-dir:.*', and its config.json cannot be read: Config file not found"):
        find_architecture(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QatError, match=r"its config.json cannot be read"):
        find_architecture(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "no_such_model", "pretrained_cfg": {}}')
    with pytest.raises(QatError, match="has no model 'no_such_model'"):
        find_architecture(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("arch", ["hf-hub:timm/nothing", "hf_hub:timm/nothing", "HF-HUB:timm/nothing@main"])
def test_a_repository_of_the_hub_without_a_network(arch):
    for use in (lambda: build_float(arch), lambda: default_preprocessing(arch)):
        with pytest.raises(QatError, match=r"config.json cannot be read: huggingface.co does not answer"):
            use()


@pytest.mark.parametrize("arch", ["timm/vit", "a\\b", "C:\\models\\vit", "zip:vit", "hf-hub:", ":vit"])
def test_a_name_that_looks_like_a_place_says_how_to_give_one(arch):
    with pytest.raises(QatError, match=r"give a name that timm knows, hf-hub:NAME .* or local-dir:PATH"):
        find_architecture(arch)


@pytest.mark.parametrize(
    ("arch", "near"),
    [("deit_tinny", "deit_tiny_patch16_224"), ("vit_medium_patch16_reg4_256", "vit_medium_patch16_reg4_gap_256")],
)
def test_similar_names_are_of_the_same_family(arch, near):
    with pytest.raises(QatError, match=f"has no model '{arch}'; similar names: {near}"):
        find_architecture(arch)


def test_pretrained_weights_without_a_network_fail_at_once():
    started = time.perf_counter()
    with pytest.raises(QatError, match=r"pretrained weights of .*does not answer.*--model.checkpoint FILE"):
        build_float(f"{DEIT}.fb_in1k")
    assert time.perf_counter() - started < 3


def test_weights_that_were_downloaded_before_need_no_network(tmp_path, monkeypatch):
    """The layout of the hub's cache: a snapshot of a repository, named by its revision."""
    snapshot = tmp_path / "models--timm--deit_tiny_patch16_224.fb_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    weights = build_float(DEIT, None).state_dict()
    save_file(weights, snapshot / "model.safetensors")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = build_float(f"{DEIT}.fb_in1k")
    assert torch.equal(model.head.weight, weights["head.weight"])


def test_a_url_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://example.invalid/weights.pth"
    with pytest.raises(QatError, match=r"example.invalid does not answer"), quickly(None, url=url):
        pass
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/weights.pth").touch()
    with quickly(None, url=url):
        pass
    assert source_of({"url": url}, DEIT) == {"repo": None, "url": url}
    assert source_of({"hf_hub_id": "timm/", "url": url}, DEIT)["repo"] == f"timm/{DEIT}"


def test_a_proxy_is_asked_in_place_of_the_host(monkeypatch):
    asked = []

    class Connection:
        def close(self) -> None: ...

    def connect(address: tuple[str, int], timeout: float) -> Connection:
        asked.append(address)
        return Connection()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert answers("https://huggingface.co/x")
    assert answers("https://inside.example")
    assert asked == [("proxy.example", 3128), ("inside.example", 443)]


@pytest.mark.parametrize(("size", "resize"), [(224, 248), (384, 426), (32, 35), (256, 284)])
def test_the_short_side_is_resized_as_timm_does_it(size, resize):
    assert default_preprocessing(DEIT, {"img_size": size}).resize == resize
