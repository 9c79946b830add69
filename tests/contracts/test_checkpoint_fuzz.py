"""Three hundred damaged checkpoints: each is refused in one line, or gives the model that it holds, within a second."""

from __future__ import annotations

import copy
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from qat import build_float, build_recipe, calibrate, checkpoint, quantize
from qat.errors import QatError
from qat.models import default_preprocessing, param_groups, read_weights
from qat.sites.insert import quantizers

ARCH = "deit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
CASES, SECONDS = 300, 1.0
Mutation = Callable[[random.Random, Any], Any]


def deep(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice([8, 100])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 10**12, 10**400, 0.5, -0.5, math.nan, math.inf, "", "4", "nan", "no.such.Kind",
    "os.system", "antigravity.fly", "a\nb", "x" * 100_000, "\ud800", [], {}, (), [None], {1: 2}, b"bytes", {1, 2},
    [[]], {"class_path": "LSQ"}, torch.zeros(()), torch.ones(3), 1j, [1, 2, 3],
]  # fmt: skip
ANY: dict[str, Mutation] = {
    "another value": lambda rng, value: copy.deepcopy(rng.choice(VALUES)),
    "text": lambda rng, value: str(value)[:200],
    "in a list": lambda rng, value: [value],
    "in a mapping": lambda rng, value: {"value": value},
    "deep": deep,
    "twice": lambda rng, value: [value, value],
}
NUMBERS: dict[str, Mutation] = {
    "NaN": lambda rng, value: math.nan,
    "negative": lambda rng, value: -value,
    "huge": lambda rng, value: value * 10 ** rng.choice([3, 6, 9, 300]),
    "almost": lambda rng, value: value + rng.choice([-1, 1]),
    "fraction": lambda rng, value: value / 3,
}
TENSORS: dict[str, Mutation] = {
    "NaN": lambda rng, value: value * math.nan,
    "infinite": lambda rng, value: value + math.inf,
    "negative": lambda rng, value: -value.abs() - 1,
    "zero": lambda rng, value: value * 0,
    "huge": lambda rng, value: value * 1e30,
    "another shape": lambda rng, value: rng.choice([value.flatten()[1:], value[None], value.expand(2, *value.shape)]),
    "another type": lambda rng, value: value.to(rng.choice([torch.complex64, torch.int8, torch.bool, torch.float16])),
    "sparse": lambda rng, value: value.to_sparse(),
    "one NaN": lambda rng, value: torch.cat([value.flatten()[1:], torch.tensor([math.nan])]).view(value.shape),
}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """What a training checkpoint of a tiny DeiT holds."""
    torch.manual_seed(0)
    model = build_float(ARCH, None, 10, TINY)
    rules = build_recipe("vvtq", w_bits=4, a_bits=4)
    calibrate(quantize(model, rules), [torch.randn(2, 3, 32, 32)])
    optimizer = AdamW(param_groups(model, 0.1, 1e-3, 1e-3))
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    for _, quantizer in quantizers(model):
        quantizer.project_()
    names = [f"class {i}" for i in range(10)]
    plain = default_preprocessing(ARCH, TINY).to_dict()
    card = checkpoint.Card(ARCH, dict(TINY), 10, [rule.to_dict() for rule in rules], plain, names)
    progress = {"total": {"ready": 3, "completed": 3}, "current": {"ready": 1, "completed": 1}}
    return {
        "epoch": 0,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "qat": card.to_dict() | {"options": {"model.lr": "0.1"}, "calibration": {}},
        "state_dict": {f"model.{name}": value.detach() for name, value in model.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "loops": {"fit_loop": {"epoch_progress": progress, "epoch_loop.batch_progress": progress}},
        "callbacks": {},
    }


def mutate(content: Any, rng: random.Random) -> str:
    """Change one thing in a nested content, somewhere down a random path; returns what was done."""
    target = content
    path = rng.choice(["qat", "qat", "qat", "state_dict", "state_dict", "optimizer_states", "loops", ""])
    if path:
        target = content[path]
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = rng.choice(keys)
        if rng.random() < 0.35 or not isinstance(target[key], dict | list) or not target[key]:
            break
        target = target[key]
    return f"{path} ... {key}: {change(target, key, rng)}"


def change(target: Any, key: Any, rng: random.Random) -> str:
    """Delete, rename, double or change one entry."""
    chance, value = rng.random(), target[key]
    if chance < 0.15:
        del target[key]
        return "deleted"
    if chance < 0.25 and isinstance(target, dict):
        target[rng.choice([f"{key}_", "other", 3])] = target.pop(key)
        return "renamed"
    if chance < 0.3:
        if isinstance(target, dict):
            target["extra"] = value
        else:
            target.append(value)
        return "doubled"
    kinds = dict(ANY)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        kinds = {**TENSORS, "another value": ANY["another value"]}
    elif isinstance(value, int | float) and not isinstance(value, bool):
        kinds |= NUMBERS
    name = rng.choice(list(kinds))
    target[key] = kinds[name](rng, value)
    return name


def damage(path: Path, rng: random.Random) -> str:
    """Cut a file, or flip some of its bits."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.4:
        path.write_bytes(data[: rng.randrange(len(data))])
        return "cut"
    for _ in range(rng.choice([1, 4, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "bits flipped"


def use(path: Path) -> None:
    """All that verbs do with a checkpoint: read it, resume from it, build its model and compute with it."""
    card, content = checkpoint.read(path)
    checkpoint.check_run(content, card, str(path), resumes=True)
    model = checkpoint.load(path)
    size = card.preprocessing["size"]
    assert card.num_classes == model(torch.zeros(1, 3, size, size)).shape[-1]
    state = model.state_dict()
    assert all(torch.equal(state[n.removeprefix("model.")], v.float()) for n, v in content["state_dict"].items())
    AdamW(param_groups(model, 0.1, 1e-3, 1e-3)).load_state_dict(content["optimizer_states"][0])


def survives(path: Path, read: Callable[[Path], object]) -> str:
    """The refusal, or "used"; AssertionError for any other error, for many lines, and after a second."""
    started = time.process_time()
    try:
        read(path)
        message = "used"
    except QatError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{read.__name__}: {type(error).__name__}: {error}") from error
    assert time.process_time() - started < SECONDS
    assert "\n" not in message
    assert len(message) < 1000
    return message


def spoilt(whole: dict[str, Any], path: Path, seed: int) -> list[str]:
    """Write a checkpoint with one or two changes, or a damaged file; returns what was done."""
    rng, content = random.Random(seed), copy.deepcopy(whole)
    done = [mutate(content, rng) for _ in range(rng.choice([1, 1, 1, 2]))] if rng.random() < 0.85 else []
    torch.save(content, path)
    return done or [damage(path, rng)]


def test_no_damage_gets_through(whole, tmp_path):
    path, used, refused = tmp_path / "a.ckpt", 0, set()
    for seed in range(CASES):
        done = spoilt(whole, path, seed)
        try:
            message = survives(path, use)
            if seed % 3 == 0:
                survives(path, read_weights)
                survives(path, checkpoint.find_card)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {done}: {error}") from error
        used += message == "used"
        refused.add(message)
    assert "antigravity" not in sys.modules
    assert CASES // 10 < used < CASES // 3  # some changes do no harm
    assert len(refused) > CASES // 3


def test_the_undamaged_file_is_used(whole, tmp_path):
    torch.save(whole, tmp_path / "a.ckpt")
    for read in (use, read_weights, checkpoint.find_card):
        assert survives(tmp_path / "a.ckpt", read) == "used"
