"""How much each row of a layer's output matters: the Fisher information of the float model's own predictions.

A token that no later layer reads has none: in the last block of a ViT with a class token, the outputs of all other
tokens are lost. Labels are drawn from the float model's softmax, so that the gradient of their cross-entropy has the
Fisher matrix as its covariance; for the most probable class it would be biased, and for its own output zero.
Shapes: B images, n rows of a layer's output for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QatError
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, switched_off

PART = 8  # images that go backward at once: what autograd keeps of a batch can be larger than all the rest
LABELS = 4  # drawn for each image: with a single one, the importance of a row is mostly chance
Importance = dict[str, list[list[Tensor]]]  # by name of a layer, for every batch and visit: (B, n / B)


def row_importance(model: nn.Module, batches: Iterable[Tensor], layers: Mapping[str, nn.Module]) -> Importance:
    """The mean squared gradient of every row of the output of layers, in the float model.

    Args:
        model: in evaluation mode; its quantizers are switched off meanwhile.
        batches: normalized images (B, 3, S, S).
        layers: linear layers and convolutions, by name.
    """
    found: Importance = {name: [] for name in layers}
    if not layers:
        return found
    generator = torch.Generator().manual_seed(0)
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in learning:
            parameter.requires_grad_(False)
        with torch.enable_grad(), switched_off(quantizer for _, quantizer in quantizers(model)):
            for images in batches:
                parts = [_of_part(model, part, layers, generator) for part in images.split(PART)]
                for name in layers:
                    found[name].append(
                        [torch.cat(visit) for visit in zip(*(part[name] for part in parts), strict=True)]
                    )
    finally:
        for parameter, required in learning:
            parameter.requires_grad_(required)
    return found


def _of_part(
    model: nn.Module, images: Tensor, layers: Mapping[str, nn.Module], generator: torch.Generator
) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    starts: list[Tensor] = []  # outputs from which the graph begins

    def follow(name: str, args: tuple[Any, ...], out: Tensor) -> None:
        if not out.requires_grad:
            starts.append(out.requires_grad_())
        axis = 1 if isinstance(getattr(layers[name], "options", None), dict) else -1  # the channels of a convolution
        with torch.no_grad():
            rows = _rows(torch.zeros_like(out), axis)
        found[name].append(rows)

        def add(grad: Tensor) -> None:  # as it comes by, so that the gradients of one layer are held at a time
            rows.add_(_rows(grad.detach().square(), axis), alpha=1 / LABELS)

        out.register_hook(add)

    with watching(layers, after=follow):
        logits = model(images).float()
    if not bool(logits.isfinite().all()):
        raise QatError("the float model's logits are not finite: check its checkpoint and the calibration images")
    probs = logits.detach().softmax(-1).cpu()
    labels = torch.multinomial(probs, LABELS, replacement=True, generator=generator).to(logits.device)
    for k in range(LABELS):
        loss = F.cross_entropy(logits, labels[:, k], reduction="sum")
        torch.autograd.grad(loss, starts, allow_unused=True, retain_graph=k + 1 < LABELS)
    return found


def _rows(squares: Tensor, axis: int) -> Tensor:
    """The mean over channels, for every image the rows of its output (B, n / B)."""
    return squares.mean(axis).flatten(1) if squares.ndim > 2 else squares.mean(1, keepdim=True)
