"""The signal-to-noise ratio of every site of a quantized model, in decibels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import log10
from typing import Any

import torch
from torch import Tensor, nn

from qat.ptq.base import undisturbed
from qat.sites.hooks import watching
from qat.sites.insert import quantizers


def site_errors(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """10 log10(signal / noise) of every quantized site, by name, in the order of the network.

    Signal and noise are sums of squares: of the tensor that a quantizer approximates, and of its error, in the model
    with its quantizers as they are switched. A site without error is left out: its ratio is infinite.

    Args:
        model: calibrated.
        batches: normalized images (B, 3, S, S).
    """
    sums: dict[str, Tensor] = {}
    with undisturbed(model), torch.no_grad(), _summing(model, sums):
        for images in batches:
            model(images)
    found = {name: sums[name].tolist() for name, _ in quantizers(model) if name in sums}
    return {name: 10 * log10(signal / noise) for name, (signal, noise) in found.items() if signal and noise}


@contextmanager
def _summing(model: nn.Module, sums: dict[str, Tensor]) -> Iterator[None]:
    """Add squares of signal and error (2,) of every site to ``sums`` inside the block."""

    sites = dict(quantizers(model))

    def add(name: str, args: tuple[Any, ...], out: Tensor) -> None:
        quantizer = sites[name]
        if not quantizer.layout.batched and name in sums:
            return  # a weight is the same for every batch
        target = quantizer.target(*args).double()
        both = torch.stack([target.square().sum(), (out.double() - target).square().sum()])
        sums[name] = sums[name] + both if name in sums else both

    with watching(sites, after=add):
        yield
