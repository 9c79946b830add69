"""Calibration by observers on a whole model: what it changes, and what it leaves alone."""

import logging
from argparse import ArgumentError

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from qat.errors import QatError
from qat.models import build_float
from qat.ptq import InitSteps, Observe, PTQMethod
from qat.quantizers import Uniform
from qat.recipe import Rule
from qat.sites.insert import quantize, quantizers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
WEIGHTS = Uniform(8, signed=True, granularity="channel", zero="none")
INPUTS = Uniform(8, zero="clipped")
KINDS = ("minmax", "ema", "percentile", "omse")


def tiny(*rules: Rule) -> nn.Module:
    torch.manual_seed(0)
    model = build_float("deit_tiny_patch16_224", None, 10, TINY).eval()
    rules = rules or (Rule("*.weight_quant", WEIGHTS), Rule("*.input_quant", INPUTS), Rule("*.probs_quant", INPUTS))
    return quantize(model, rules)


def batches(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def switches(model: nn.Module) -> list[bool]:
    return [
        *(module.training for module in model.modules()),
        *(parameter.requires_grad for parameter in model.parameters()),
        *(quantizer.enabled for _, quantizer in quantizers(model)),
    ]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_filled_and_nothing_else_changes(kind):
    model = tiny()
    before, set_before = state(model), switches(model)
    Observe(kind)(model, batches())
    assert all(quantizer.calibrated for _, quantizer in quantizers(model))
    after = state(model)
    filled = {name for name, value in before.items() if value.isnan().any()}
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in filled)
    assert switches(model) == set_before
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_values_which_load_strictly(kind):
    models = [tiny() for _ in range(2)]
    for model in models:
        Observe(kind, samples=200)(model, iter(batches()))
    first, second = (state(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    fresh = tiny()
    fresh.load_state_dict(first, strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(batches()[0]), models[0](batches()[0]))


def test_the_range_is_that_of_all_batches_of_the_float_model():
    model, seen = tiny(), []
    images = [image * scale for image, scale in zip(batches(), (1, 3, 2), strict=True)]
    reference = build_float("deit_tiny_patch16_224", None, 10, TINY).eval()
    reference.load_state_dict({name: value for name, value in state(model).items() if "_quant" not in name}, False)
    reference.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for image in images:
            reference(image)
    Observe()(model, images)
    values = torch.cat(seen)
    step = (values.max() - values.min()) / 255
    torch.testing.assert_close(model.head.input_quant.step[0], step, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_their_full_range_whatever_the_observer(kind):
    model = tiny()
    Observe(kind)(model, batches())
    expected = 2 * model.head.weight.abs().amax(1) / 255
    torch.testing.assert_close(model.head.weight_quant.step, expected)


def test_sites_that_are_calibrated_are_left_alone():
    model = tiny()
    InitSteps()(model, batches())
    before = state(model)
    Observe("omse")(model, [])  # nothing is left to do, so no image is needed
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_site_that_no_image_reaches_is_named():
    with pytest.raises(QatError, match=r"no calibration image reached 'patch_embed.proj.input_quant'.*images"):
        Observe()(tiny(), [])


def test_values_that_are_no_numbers_are_named():
    with pytest.raises(QatError, match=r"'patch_embed.proj.input_quant'.*not finite"):
        Observe()(tiny(), [torch.full((1, 3, 32, 32), torch.nan)])


def test_options_are_checked():
    with pytest.raises(QatError, match="observer is 'median': give minmax, ema, percentile or omse"):
        Observe("median")
    with pytest.raises(QatError, match="samples is 0"):
        Observe(samples=0)


@pytest.mark.parametrize(
    "options",
    [["Observe", "--method.observer=median"], ["Observe", "--method.seed=x"], ["InitSteps", "--method.seed=x"]],
)
def test_options_are_checked_on_the_command_line(options):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--method", type=PTQMethod)
    with pytest.raises(ArgumentError, match="Parser key"):
        parser.parse_args(["--method", *options])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_everything_is_put_back_when_it_is_interrupted(error):
    def failing():
        yield batches()[0]
        raise error

    model = tiny().train()
    model.head.input_quant.enabled = False
    model.blocks[0].norm1.eval()
    model.head.weight.requires_grad_(False)
    before = switches(model)
    with pytest.raises(error):
        Observe()(model, failing())
    assert switches(model) == before
    assert hooks(model) == 0


def test_only_init_steps_may_run_on_every_rank():
    assert not InitSteps.single_device
    assert Observe.single_device


def test_progress_is_reported_where_the_number_of_batches_is_known(caplog):
    with caplog.at_level(logging.INFO, "qat.progress"):
        Observe()(tiny(), batches())
    assert "calibration batches: 3 of 3" in caplog.text
    assert "calibrated sites:" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "qat.progress"):
        Observe()(tiny(), iter(batches()))
    assert "calibration batches" not in caplog.text
