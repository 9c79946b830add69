"""Training that keeps the codes of weights at first."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from qat.callbacks import Calibrate, FrozenCodes
from qat.cli.main import main
from qat.errors import QatError
from qat.sites.insert import weights
from qat.training.module import QATModule
from tests.training.runs import fit, tiny_module


def codes_of(module: QATModule) -> dict[str, Tensor]:
    return {site.name: site.quantizer.encode(site.weight.detach()) for site in weights(module.model)}


class Recorder(FrozenCodes):
    """Remembers codes, steps and biases at the start and after every step."""

    def __init__(self, share: float) -> None:
        super().__init__(share)
        self.codes: list[dict[str, Tensor]] = []
        self.values: list[dict[str, Tensor]] = []

    def _note(self, module: QATModule) -> None:
        self.codes.append(codes_of(module))
        self.values.append({name: value.detach().clone() for name, value in module.model.state_dict().items()})

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self._note(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self._note(pl_module)


@pytest.mark.parametrize("recipe", ["vvtq", "frontier"])
def test_codes_stay_while_everything_else_learns(recipe, images, tmp_path):
    recorder = Recorder(0.5)
    module = tiny_module(recipe=recipe, lr=1e-2, step_lr=1e-6, weight_decay=0.1)
    fit(module, images, tmp_path, [recorder], max_steps=8)
    for k in range(1, 5):
        assert all(torch.equal(recorder.codes[k][name], first) for name, first in recorder.codes[0].items()), k
        for name, value in recorder.values[k].items():
            if name.endswith(("weight_quant.step", ".bias")) and "qkv.bias" not in name:
                assert not torch.equal(value, recorder.values[k - 1][name]), name
    changed = [name for name, codes in recorder.codes[-1].items() if not torch.equal(codes, recorder.codes[4][name])]
    assert len(changed) > 5, "then weights learn"
    assert not any(module._forward_hooks for module in module.model.modules())


def test_a_weight_is_the_value_of_its_code(images, tmp_path):
    """Also what a checkpoint saves, which needs no callback."""
    recorder = Recorder(1.0)
    module = tiny_module(lr=1e-2)
    fit(module, images, tmp_path, [recorder], max_steps=3)
    for name, weight, quantizer in weights(module.model):
        assert torch.equal(weight, quantizer(weight)), name


def test_a_run_that_resumes_after_this_part_is_left_alone(images, tmp_path):
    module = tiny_module(lr=1e-2)
    trainer = fit(module, images, tmp_path, max_steps=4)
    callback = FrozenCodes(0.25)
    callback.on_train_start(trainer, module)
    assert module.progress == 1
    assert not callback._held
    assert not any(part._forward_hooks for part in module.model.modules())


def test_adam_begins_anew_for_weights_that_learn(images, tmp_path):
    """Otherwise its first steps would be too large: it has counted gradients of zero."""
    module = tiny_module(lr=1e-3)
    trainer = fit(module, images, tmp_path, [FrozenCodes(0.5)], max_steps=8)
    state = trainer.optimizers[0].state
    counts = {name: float(state[site.weight]["step"]) for site in weights(module.model) for name in [site.name]}
    assert set(counts.values()) == {4}
    assert float(state[module.model.cls_token]["step"]) == 8


def test_a_longer_run_does_not_hold_them_again(images, tmp_path):
    module, callback = tiny_module(lr=1e-3), FrozenCodes(0.25)
    trainer = fit(module, images, tmp_path, [callback], max_steps=8)
    module.total = 80
    again = FrozenCodes(0.25)
    again.load_state_dict(callback.state_dict())
    again.on_train_start(trainer, module)
    assert not again._held


def test_an_error_leaves_no_hook(images, tmp_path, monkeypatch):
    module = tiny_module(lr=1e-2)
    monkeypatch.setattr(QATModule, "on_train_batch_end", lambda *args: (_ for _ in ()).throw(QatError("here")))
    with pytest.raises(QatError, match="here"):
        fit(module, images, tmp_path, [FrozenCodes()], max_steps=2)
    assert not any(part._forward_hooks for part in module.model.modules())


def test_gradients_of_steps_are_those_of_codes(images, tmp_path):
    """value = (code - zero) * step, so that the derivative by the step is the sum of gradients times codes."""
    module = tiny_module(recipe="frontier")
    callback = FrozenCodes(1.0)
    trainer = fit(module, images, Path(tmp_path), max_steps=1)
    module.total = 10
    callback.on_train_start(trainer, module)
    site = next(site for site in weights(module.model) if site.name == "blocks.0.mlp.fc1.weight_quant")
    upstream = torch.randn(site.weight.shape, generator=torch.Generator().manual_seed(0))
    site.quantizer.step.grad = site.weight.grad = None
    site.quantizer(site.weight).backward(upstream)
    codes = site.quantizer.encode(site.weight.detach()).float() - site.quantizer.zero_point[:, None]
    gain = site.quantizer.gain(site.weight)
    torch.testing.assert_close(site.quantizer.step.grad, gain * (upstream * codes).sum(1))
    assert not site.weight.grad.any()
    callback.on_train_end(trainer, module)


def test_a_glob_that_matches_nothing_is_refused_before_the_calibration(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Calibrate, "setup", lambda *args: pytest.fail("the model was calibrated"))
    callback = '[{"class_path": "FrozenCodes", "init_args": {"sites": "nothing.*"}}]'
    assert main(["fit", "--config", str(config), "--runs", str(tmp_path), "--trainer.callbacks", callback]) == 2
    assert "no quantized weight of at most 16 bits matches 'nothing.*'" in capsys.readouterr().err


def test_a_calibration_that_leaves_all_weights_in_floating_point_does_not_stop_the_training(images, tmp_path, caplog):
    """As AIQViT does with its compensation at the side; the calibration took hours by then."""

    class LeaveFloat(L.Callback):
        def setup(self, trainer, pl_module, stage) -> None:
            for site in list(weights(pl_module.model)):
                pl_module.model.set_submodule(site.name, torch.nn.Identity())

    fit(tiny_module(recipe="frontier"), images, tmp_path, [FrozenCodes(), LeaveFloat()], max_steps=1)
    assert "left all weights of *.weight_quant in floating point" in caplog.text
