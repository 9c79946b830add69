"""Attention of SReT within groups of tokens, and the order in which tokens are grouped.

A token attends within a group of neighbours. Before the second application of a block the tokens are shuffled, so that
the groups differ; the official model does so in evaluation too, where an order is fixed here (`evaluation_order`).
Shapes: B images, N tokens in raster order, C channels, G groups of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.errors import QatError


def evaluation_order(permutation: str | int, tokens: int, index: int) -> Tensor | None:
    """An order (N,) of the tokens for the block ``index`` of a model; None for raster order.

    Args:
        permutation: ``portable`` (a formula, the same in every language and on every device), ``identity``, or the
            seed of a random draw.
        tokens: N.
        index: counts the blocks of all stages from 0.
    """
    if permutation == "portable":
        i = torch.arange(tokens, device="cpu")
        return ((31 * i * i + 7919 * i + 104729 * (index + 1)) % 10007).argsort(stable=True)
    if permutation == "identity":
        return None
    if isinstance(permutation, bool) or not isinstance(permutation, int):
        raise QatError(f"eval_permutation is {permutation!r}: choose portable, identity, or an integer as seed")
    generator = torch.Generator().manual_seed(1000 * permutation + index)  # no model has a thousand blocks
    return torch.randperm(tokens, generator=generator, device="cpu")


class Grouping(nn.Module):
    """Attention within groups of N / G tokens: neighbours, or neighbours after a shuffle in the second application.

    Groups become samples of the batch, so that the attention is that of any transformer.

    Args:
        tokens: N.
        groups: G in the first and in the second application; where G = 1 nothing is shuffled.
        order: order of the tokens (N,) in evaluation, None for raster order; training draws one from torch's global
            generator in every call.
    """

    def __init__(self, tokens: int, groups: tuple[int, int], order: Tensor | None = None) -> None:
        super().__init__()
        for G in groups:
            if G < 1 or tokens % G:
                raise QatError(f"{tokens} tokens cannot be cut into {G} equal groups: change img_size or groups")
        self.tokens, self.groups = tokens, groups
        self.order = order  # not a buffer: a weight average would round its integers down

    def forward(self, attn: Callable[[Tensor], Tensor], x: Tensor, again: bool) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        (B, N, C), G = x.shape, self.groups[again]
        order = self.draw(x) if again and G > 1 else None
        x = x if order is None else x.index_select(1, order)
        x = attn(x.reshape(B * G, N // G, C)).reshape(B, N, C)
        return x if order is None else x.index_select(1, order.argsort())

    def draw(self, x: Tensor) -> Tensor | None:
        """The order of the tokens, on the device of ``x``."""
        if self.training:
            return torch.randperm(self.tokens, device=x.device)
        return None if self.order is None else self.order.to(x.device)
