"""Weights into a model: compared by name and shape in one place, adapted by timm where it can, and loaded strictly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import model_entrypoint, split_model_name_tag
from torch import Tensor, nn

from qat.errors import QatError

log = logging.getLogger(__name__)
COMPUTED = ("relative_position_index", "attn_mask")  # buffers that the model computes
LAYERS_OF_OTHERS = ("pre_logits",)  # timm drops these although they change the result


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str, fresh_head: bool = False) -> None:
    """Load float weights into ``model``, which must be exactly those that it has.

    Weights of another image size are resampled, and older layouts are renamed, by timm's own function for the model;
    what it changed is logged.

    Args:
        model: with or without quantizers.
        state: tensors by name.
        source: what the errors call them.
        fresh_head: keep the random head of the model and leave out that of ``state``.

    Raises:
        QatError: says which names are missing, unexpected, of another shape or type, or not finite.
    """
    own = model.state_dict()
    state = with_born_biases(model, own, state)
    heads = find_heads(model)
    body = {name: value for name, value in state.items() if not name.startswith(heads)}
    if any(name not in own or own[name].shape != value.shape for name, value in body.items()):
        state = adapted(model, state, source)
    if fresh_head:
        state = {name: value for name, value in state.items() if not name.startswith(heads)}
        state.update({name: value for name, value in own.items() if name.startswith(heads)})
        log.info("fresh head: %s start from random weights", ", ".join(sorted(n for n in own if n.startswith(heads))))
    check_state(own, state, source, heads)
    model.load_state_dict(state, strict=True)


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Any], source: str, heads: tuple[str, ...] = ()) -> None:
    """Check that ``state`` has the names, shapes and kinds of numbers of ``own``, and that all of them are finite.

    Args:
        own: what the model has; tensors may be on the device ``meta``.
        state: what is to be loaded.
        source: what the errors call ``state``.
        heads: prefixes of the classifier, where a new one can take its place.

    Raises:
        QatError: for everything that differs; names are counted and the first ones shown.
    """
    missing, extra = [name for name in own if name not in state], [name for name in state if name not in own]
    wrong = [name for name in own if name in state and _outline(state[name]) != _outline(own[name])]
    if heads and wrong and not missing and not extra and all(name.startswith(heads) for name in wrong):
        raise head_error(source, len(state[wrong[0]]), len(own[wrong[0]]))
    if heads and missing and not wrong and not extra and missing == [name for name in own if name.startswith(heads)]:
        raise head_error(source, 0, len(own[missing[0]]))  # of a backbone
    parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
    parts += [f"{len(extra)} unexpected ({_some(extra)})"] if extra else []
    parts += [f"{len(wrong)} of another shape or type ({_differences(own, state, wrong)})"] if wrong else []
    if parts:
        raise QatError(f"{source} does not fit the model: {', '.join(parts)}{_hint(extra)}")
    for name, value in state.items():
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():  # sums are fast
            bad = int((~value.isfinite()).sum())
            raise QatError(
                f"{source}: {bad} of the {value.numel()} numbers in {name!r} are not finite: the training that wrote "
                "them had diverged, or the file is damaged; give another one"
            )


def adapted(model: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights after timm's own conversion for this model; unchanged where timm has none, or cannot convert them."""
    convert = _find_filter(model)
    if convert is None or any(part in name for name in state for part in LAYERS_OF_OTHERS):
        return dict(state)
    options = {"adapt_layer_scale": True} if any("gamma_" in name for name in state) else {}
    try:
        changed = convert(dict(state), model, **options)
    except Exception:  # it is made for files of this model; what does not fit is named afterwards
        return dict(state)
    _log_changes(state, changed, source)
    return dict(changed)


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters of the classifier, from the timm configuration of the model."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def head_error(source: str, theirs: int | None, ours: int | None) -> QatError:
    """The error for weights whose head has another number of classes."""
    return QatError(
        f"{source} has a head of {theirs} classes, {ours} are needed: "
        "a student can start from a new, untrained head with --model.fresh_head true"
    )


def with_born_biases(model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights with the biases that the float layers do not have, but for those that hold a folded zero point."""
    layers = [(name, module) for name, module in model.named_modules() if getattr(module, "born_bias", False)]
    free = [name for name, module in layers if f"{name}.{module.input_name}.zero_point" not in state]
    return {f"{name}.bias": torch.zeros(own[f"{name}.bias"].shape) for name in free} | dict(state)


def _find_filter(model: nn.Module) -> Callable[..., Any] | None:
    """timm's function that converts weights for the family of a model."""
    arch = str(getattr(model, "pretrained_cfg", {}).get("architecture", ""))
    try:
        module = sys.modules[model_entrypoint(split_model_name_tag(arch)[0]).__module__]
    except (KeyError, RuntimeError):
        return None
    found: Callable[..., Any] | None = getattr(module, "checkpoint_filter_fn", None)
    return found


def _log_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor], source: str) -> None:
    """Say what a conversion resampled, renamed and left out."""
    kept = {id(value) for value in after.values()}
    resampled = [n for n, value in after.items() if n in before and value.shape != before[n].shape]
    renamed = [n for n in after if n not in before]
    left = [n for n, value in before.items() if n not in after and id(value) not in kept]
    for name in resampled:
        shapes = tuple(before[name].shape), tuple(after[name].shape)
        log.info("%s: %s resampled from %s to %s", source, name, *shapes)
    if renamed:
        log.info("%s: timm renamed %d weights (%s)", source, len(renamed), _some(renamed))
    if left:
        level = logging.INFO if all(name.endswith(COMPUTED) for name in left) else logging.WARNING
        log.log(level, "%s: left out %d tensors that the model does not have (%s)", source, len(left), _some(left))


def _outline(value: Any) -> tuple[Any, ...]:
    """What has to agree: the shape, and whether it holds real numbers, integers or others, in a plain layout."""
    if not isinstance(value, Tensor):
        return (type(value).__name__,)
    plain = value.layout == torch.strided and not value.is_quantized
    return tuple(value.shape), value.is_floating_point(), value.is_complex(), plain


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Any], names: list[str]) -> str:
    shown = [f"{name!r}: {_describe(state[name])}, not {_describe(own[name])}" for name in names[:2]]
    return ", ".join(shown) + (", ..." if len(names) > 2 else "")


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _hint(extra: list[str]) -> str:
    if any(name.endswith(("_quant.step", "_quant.log_step", "_quant.offset")) for name in extra):
        return "; it holds quantizer steps, so it is a quantized checkpoint: use --ckpt, or --model.quant_checkpoint"
    if any(name.endswith((".alpha", ".nbits", ".attn.proj_q.weight")) for name in extra):
        return "; these are names of VVTQ: translate the file with `qat convert-official` first"
    if any(name.startswith("transformers.") for name in extra):
        return "; these are names of the official SReT: translate the file with `qat convert-official` first"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
