"""What a checkpoint must hold beside its card: weights that fit its model, and the state of a run that can resume."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qat.checkpoint.card import DAMAGED, Card, check_plain
from qat.errors import QatError
from qat.models import param_groups
from qat.models.build import at_most
from qat.models.loading import check_state, with_born_biases
from qat.ranges import Range, check_value, shown
from qat.sites.insert import quantizers

KEY = "qat"
AVERAGED = "current_model_state"  # where a weight average puts the weights that training resumes from
PREFIX = "model."  # what the LightningModule puts before every name of the timm model
DATA = "ImageNetDataModule"  # under this name Lightning stores the state of our data module
VERSION = "pytorch-lightning_version"
NAMES_PER_TENSOR = 4  # a quantized module takes over the parameters of a float one, so each is registered several times
Count = Annotated[int, Range(0)]
Crops = Annotated[int, Range(1)]
ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "foreach": None,
    "fused": None,
}
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
WAY_OUT = "start from its weights with --model.quant_checkpoint instead"
_outlines: dict[str, nn.Module] = {}  # the last one: a command asks for it several times


def outline(card: Card, tensors: int) -> nn.Module:
    """The model of a card on the device ``meta``: names and shapes without memory.

    Args:
        card: describes the model.
        tensors: how many the checkpoint holds; the building of a model that needs far more is stopped.

    Raises:
        QatError: the model cannot be built, or is far larger than the checkpoint.
    """
    described = repr((card.arch, card.model_args, card.num_classes, card.rules))
    if described not in _outlines:
        with at_most(NAMES_PER_TENSOR * tensors + 100), torch.device("meta"):
            model = card.build()
        _outlines.clear()
        _outlines[described] = model
    return _outlines[described]


def model_weights(content: Mapping[str, Any], source: str, key: str = "state_dict") -> dict[str, Any]:
    """The weights of a checkpoint under the names of the timm model; QatError where there are none."""
    table = content.get(key)
    if not isinstance(table, Mapping):
        raise QatError(f"{source} has no table of weights {key!r}: {DAMAGED}")
    if not all(isinstance(name, str) for name in table):
        raise QatError(f"{source}: a name in {key!r} is not text: {DAMAGED}")
    return {name.removeprefix(PREFIX): value for name, value in table.items()}


def check_content(content: Mapping[str, Any], card: Card, source: str) -> nn.Module:
    """Check that weights and steps belong to the model of the card, and that the rest of the card is readable.

    Returns:
        The model on the device ``meta``.

    Raises:
        QatError: naming what is missing, unexpected, of another shape or type, not finite, or no step.
    """
    state = model_weights(content, source)
    try:
        model = outline(card, len(state))
    except QatError as error:
        raise QatError(f"{source}: the model that its card describes cannot be built: {error}") from None
    check_weights(model, state, source)
    if AVERAGED in content:
        check_weights(model, model_weights(content, source, AVERAGED), f"{source}, {AVERAGED}")
    for name in ("options", "calibration"):
        if not isinstance(content[KEY].get(name, {}), Mapping):
            raise QatError(f"{source}: {name!r} of its card is no mapping: {DAMAGED}")
    return model


def check_weights(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Raise QatError unless ``state`` has the weights of ``model``, all finite, and steps above zero."""
    own = model.state_dict()
    check_state(own, with_born_biases(model, own, state) if own else state, source)
    for name, quantizer in quantizers(model):
        values = {own: state[f"{name}.{own}"] for own, _ in quantizer.named_parameters()}
        if wrong := quantizer.illegal(name, values):
            raise QatError(f"{source}: {wrong}: {DAMAGED}")


def check_run(content: Mapping[str, Any], card: Card, source: str, resumes: bool) -> None:
    """Check what Lightning needs of a checkpoint, before it gives it to its loops.

    Args:
        content: what the checkpoint holds; its weights fit the model (`check_content`).
        card: of its model.
        source: what the errors call it.
        resumes: training resumes from it, so it must hold the state of a run too.

    Raises:
        QatError: naming what is missing, of a wrong type, or belongs to other parameters.
    """
    version = content.get(VERSION)
    if not isinstance(version, str) or not re.match(r"\d+\.\d+", version):
        raise QatError(f"{source}: {VERSION} is {shown(version)}, not a version such as '2.6.0': {DAMAGED}")
    if not resumes:
        return
    for name in ("epoch", "global_step"):
        check_value(f"{source}: {name}", content.get(name), Count)
    for name, kind in (("optimizer_states", list), ("lr_schedulers", list), ("loops", Mapping), ("callbacks", Mapping)):
        if not isinstance(content.get(name), kind):
            raise QatError(f"{source} lacks {name!r}, which a run needs to resume: {DAMAGED}")
    _check_loops(content["loops"], source)
    _check_data(content.get(DATA), source)
    _check_optimizer(content, card, source)


def _check_optimizer(content: Mapping[str, Any], card: Card, source: str) -> None:
    """Raise QatError unless the state of the optimizer belongs to the parameters of the model, in their order."""
    states, schedules = content["optimizer_states"], content["lr_schedulers"]
    if len(states) != 1 or not isinstance(states[0], Mapping) or not {"state", "param_groups"} <= states[0].keys():
        raise QatError(f"{source} holds the state of no single optimizer: {WAY_OUT}")
    theirs, moments = states[0]["param_groups"], states[0]["state"]
    model = outline(card, len(content["state_dict"]))
    groups = [group["params"] for group in param_groups(model, 0.0, 1.0, 1.0, _is_older(model, theirs))]
    sizes, wanted = _sizes(theirs), [len(group) for group in groups]
    if sizes != wanted:
        raise QatError(f"{source}: its optimizer has groups of {sizes} parameters, not of {wanted}: {WAY_OUT}")
    numbers = [number for group in theirs for number in group["params"]]
    if len(set(numbers)) < len(numbers) or not isinstance(moments, Mapping) or not moments.keys() <= set(numbers):
        raise QatError(f"{source}: the numbers of the parameters in its optimizer are mixed up: {WAY_OUT}")
    for number, parameter in zip(numbers, (p for group in groups for p in group), strict=True):
        _check_moments(moments.get(number, {}), parameter, f"{source}: its optimizer")
    _check_schedule(schedules, len(groups), source)


def has_older_groups(content: Mapping[str, Any], model: nn.Module, weight_decay: float) -> bool:
    """Whether a run has the groups that older versions made without decay; QatError if it shall go on with decay."""
    if not any(_is_older(model, state["param_groups"]) for state in content.get("optimizer_states", ())):
        return False
    if weight_decay:
        raise QatError(
            f"model.weight_decay is {weight_decay:g}, but the checkpoint is from a run without, by an older version: "
            f"resume with 0, or {WAY_OUT}"
        )
    return True


def _is_older(model: nn.Module, stored: Any) -> bool:
    """Whether the stored groups of an optimizer are those that older versions made of ``model`` without decay."""
    known, older = (
        [len(group["params"]) for group in param_groups(model, 0.0, 1.0, 1.0, undivided)] for undivided in (False, True)
    )
    return _sizes(stored) == older != known


def _sizes(groups: Any) -> list[int]:
    """How many parameters the stored groups of an optimizer have; empty for what is no list."""
    return [len(group["params"]) for group in groups if _is_group(group)] if isinstance(groups, list) else []


def _is_group(group: Any) -> bool:
    """Whether a group of parameters has numbers for them, and the algorithm that AdamW has by default.

    Learning rates, decay, betas and epsilon are options of a command, which replace those of a checkpoint.
    """
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
        return False
    alike = all(group.get(key, value) is value for key, value in ADAMW.items())
    return alike and all(type(number) is int for number in group["params"])


def _check_moments(state: Any, parameter: Tensor, source: str) -> None:
    """Raise QatError unless the moments of AdamW have the shape of their parameter and are finite."""
    if not isinstance(state, Mapping) or state.keys() not in (set(), MOMENTS):
        found = list(state) if isinstance(state, Mapping) else type(state).__name__
        raise QatError(f"{source} has {shown(found)} for a parameter, not {sorted(MOMENTS)}: {WAY_OUT}")
    for name, value in state.items():
        shape = torch.Size() if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise QatError(f"{source} has {name} {what} for a parameter of {tuple(parameter.shape)}: {WAY_OUT}")
        if not bool(value.isfinite().all()):
            raise QatError(f"{source} has a {name} that is not finite: {WAY_OUT}")


def _check_schedule(schedules: list[Any], groups: int, source: str) -> None:
    """Raise QatError unless there is one schedule of learning rates, for all groups."""
    if len(schedules) != 1 or not isinstance(schedules[0], Mapping):
        raise QatError(f"{source} holds the state of no single learning rate schedule: {WAY_OUT}")
    for name in ("last_epoch", "_step_count"):
        check_value(f"{source}: {name} of its schedule", schedules[0].get(name), Count)
    if schedules[0].get("lr_lambdas") != [None] * groups:
        raise QatError(f"{source}: its schedule is not one of {groups} groups: {WAY_OUT}")


def _check_loops(loops: Mapping[str, Any], source: str) -> None:
    """Raise QatError unless the loops of training hold counters, as Lightning reads them."""
    check_plain(loops.get("fit_loop"), f"{source}: loops")
    if not isinstance(loop := loops.get("fit_loop"), Mapping):
        raise QatError(f"{source}: loops has no 'fit_loop': {DAMAGED}")
    for name, state in loop.items():
        if not isinstance(state, Mapping):
            raise QatError(f"{source}: {name} of its loops is {shown(state)}, not a mapping: {DAMAGED}")
        if name.endswith("progress"):
            _check_progress(state, f"{source}: {name}")
    stepped = loop.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", 0)
    check_value(f"{source}: _batches_that_stepped", stepped, Count)


def _check_data(state: Any, source: str) -> None:
    """Raise QatError unless the state of the data module, if there is one, says which batches are finished."""
    if state is None:
        return  # of a run with another data module
    if not isinstance(state, Mapping):
        raise QatError(f"{source}: {DATA} is {shown(state)}, not a mapping: {DAMAGED}")
    check_plain(state, f"{source}: {DATA}")
    for name, kind in (("epoch", Count), ("batches", Count), ("passes", list[Crops])):
        if name in state or name != "passes":  # older versions did not store the passes
            check_value(f"{source}: {name} of {DATA}", state.get(name), kind)


def _check_progress(state: Mapping[str, Any], name: str) -> None:
    """Raise QatError unless a mapping holds counters, in total and of the current pass, or mappings that do."""
    parts = {key: value for key, value in state.items() if isinstance(value, Mapping)}
    if {"total", "current"} <= parts.keys():
        for part in ("total", "current"):
            for key, count in parts[part].items():
                check_value(f"{name}.{part}.{key}", count, Count)
    elif parts and not {"total", "current"} & state.keys():
        for key, inner in parts.items():
            _check_progress(inner, f"{name}.{key}")
    else:
        raise QatError(f"{name} lacks counters, 'total' and 'current': {DAMAGED}")
