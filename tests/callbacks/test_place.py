"""The module is on its device before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from qat.callbacks import PlaceModule, place
from qat.errors import QatError
from qat.ptq import InitSteps
from qat.quantizers import LSQQuantizer
from qat.sites.insert import quantizers
from qat.training.module import QATModule
from tests.training.runs import fit, tiny_data, tiny_module, tiny_trainer


class Watched(EMAWeightAveraging):
    """A weight average that notes when and where it is made."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.events.append("average")
        super().setup(trainer, pl_module, stage)


def test_the_module_moves_before_an_average_is_made(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    original = QATModule.to

    def to(self: QATModule, *args: Any, **kwargs: Any) -> QATModule:
        events.append(f"to {args[0]}")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(QATModule, "to", to)
    module = tiny_module()
    InitSteps()(module.model, [torch.randn(2, 3, 32, 32)])  # so that no calibration moves it
    fit(module, images, tmp_path, [PlaceModule(), Watched(events)], max_steps=1)
    assert events[:2] == ["to cpu", "average"]


def test_a_missing_compiler_is_known_before_a_calibration(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any) -> None:
        raise QatError("model.compile: torch.compile does not work here")

    monkeypatch.setattr(place, "compiled", missing)
    monkeypatch.setattr(InitSteps, "calibrate", None)  # a call would fail
    module = tiny_module(compile=True)
    trainer = tiny_trainer(tmp_path, [PlaceModule()], max_steps=1)
    with pytest.raises(QatError, match=r"model\.compile"):
        trainer.fit(module, datamodule=tiny_data(images))


def test_quantizers_without_compiled_arithmetic_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = LSQQuantizer.compile_
    monkeypatch.setattr(LSQQuantizer, "compile_", lambda self: not self.layout.batched and original(self))
    monkeypatch.setattr(place, "compiled", lambda *args: None)
    module = tiny_module(compile=True)
    activations = sum(quantizer.layout.batched for _, quantizer in quantizers(module.model))
    assert module.uncompiled == {"LSQ": activations}
    with caplog.at_level("INFO"):
        PlaceModule().setup(tiny_trainer(tmp_path, []), module, "fit")
    assert f"no compiled arithmetic and stay as they are: {activations} LSQ" in caplog.text
