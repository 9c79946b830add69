"""Compares a model that was read from a file with the one that it was written from. Shapes: B images, S pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.checkpoint import Card
from qat.checkpoint.packed import Rest, fits_half
from qat.data.calibration import calibration_loader
from qat.data.images import EvalView, Images
from qat.data.splits import loose_source
from qat.errors import QatError
from qat.preprocessing import Preprocessing
from qat.sites.insert import quantizers, weights

RANDOM, MOST = 8, 64  # images: without a folder, and of one


def comparison_images(folder: Path | None, preprocessing: Preprocessing) -> Tensor:
    """Images uint8 (B, 3, S, S) of a folder, 64 at most, which are drawn by chance; 8 random ones without a folder.

    Raises:
        QatError: the folder has no image, or one that cannot be read.
    """
    if folder is None:
        shape = (RANDOM, 3, preprocessing.size, preprocessing.size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    all_images = Images(loose_source(folder), None, EvalView(preprocessing))
    (batch,) = calibration_loader(all_images, min(MOST, len(all_images)), MOST, seed=0, workers=0)
    if batch.bad:
        raise QatError(f"--images: {batch.bad[0]}")
    images: Tensor = batch.images
    return images


@torch.no_grad()
def compare(model: nn.Module, again: nn.Module, card: Card, rest: Rest, images: Tensor) -> dict[str, Any]:
    """Compare every tensor, and the logits of images.

    Args:
        model: what was written, in evaluation mode.
        again: what was read.
        card: of both.
        rest: how tensors are stored that are neither codes nor parameters of quantizers.
        images: uint8 (B, 3, S, S).

    Returns:
        tensors: how many were compared; different_tensors: names of those that differ; images: B;
        largest_logit_difference; same_class: share of the images that both give the same class.
    """
    wanted, found = dict(model.state_dict()), again.state_dict()
    packed = {site.name.removesuffix("_quant"): site for site in weights(model)}
    kept = {f"{name}.{key}" for name, quantizer in quantizers(model) for key in quantizer.state_dict()}
    for name, value in wanted.items():
        if name in packed:
            wanted[name] = packed[name].quantizer(packed[name].weight)
        elif rest == "float16" and name not in kept:
            wanted[name] = rounded(value)
    x = Preprocessing(**card.preprocessing).normalize(images)
    ours, theirs = model(x), again(x)
    return {
        "tensors": len(wanted),
        "different_tensors": [name for name, value in wanted.items() if not torch.equal(value, found[name])],
        "images": len(images),
        "largest_logit_difference": float((ours - theirs).abs().max()),
        "same_class": float((ours.argmax(1) == theirs.argmax(1)).float().mean()),
    }


def rounded(value: Tensor) -> Tensor:
    """A tensor as it is after it was stored in float16, where that can hold it."""
    return value.half().float() if fits_half(value) else value
