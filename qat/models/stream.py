"""Blocks on a residual stream: their sites and their norms. Shapes: B images, N tokens, C channels."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from qat.models.layers import QuantLayerNorm, QuantLinear
from qat.sites.family import NormLink
from qat.sites.insert import SiteBuilder, swap_children


class Norm(NamedTuple):
    """A norm of a block, the site that it reads, and the layers that read it, all by names inside the block."""

    name: str
    source: str | None
    readers: tuple[str, ...] = ()


class StreamBlock(nn.Module):
    """A quantized block that reads the residual stream (B, N, C) and writes it back.

    A subclass says, for each of its norms, what the norm reads and which layers read the norm.
    """

    last: ClassVar[str] = "mlp_residual_quant"  # the site of the stream after the block

    def norms(self, before: str | None) -> list[Norm]:
        """The norms of the block, in the order of the network.

        Args:
            before: the site of the stream before the block, which keeps its full name; None where there is none.
        """
        raise NotImplementedError

    def links(self, name: str, before: str | None) -> list[NormLink]:
        """The LayerNorms of the block called ``name``; norms of other kinds are left out."""
        found = []
        for norm, source, readers in self.norms(before):
            if isinstance(self.get_submodule(norm), QuantLayerNorm):
                source = source if source is None or source == before else f"{name}.{source}"
                layers = [f"{name}.{reader}" for reader in readers]
                found.append(NormLink(f"{name}.{norm}", source, layers[0] if layers else None, tuple(layers[1:])))
        return found


class TwoSumBlock(StreamBlock):
    """A block of attention and MLP with sites on the stream after each of its two sums; norms are before both.

    Args:
        block: float, with ``norm1``, ``attn``, ``norm2`` and ``mlp``, and perhaps ``gamma_1`` and ``gamma_2``, (C,)
            each, which multiply the branches.
        site: builder for the sites.
    """

    norm1: nn.Module
    attn: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: Any, site: SiteBuilder) -> None:
        super().__init__()
        C = block.attn.proj.out_features
        for name, child in block.named_children():  # in timm's order
            setattr(self, name, child)
        self.gamma_1, self.gamma_2 = getattr(block, "gamma_1", None), getattr(block, "gamma_2", None)
        swap_children(self, site)
        self.attn_residual_quant = site.activation("attn_residual_quant", channel=(-1, C))
        self.mlp_residual_quant = site.activation("mlp_residual_quant", channel=(-1, C))

    def norms(self, before: str | None) -> list[Norm]:
        """A norm before attention, and one before the MLP."""
        return [
            Norm("norm1", before, readers(self, "attn")),
            Norm("norm2", "attn_residual_quant", readers(self, "mlp")),
        ]


class PostNormBlock(TwoSumBlock):
    """The same with norms at the end of both branches, which only a sum reads."""

    def norms(self, before: str | None) -> list[Norm]:
        """A norm after attention, and one after the MLP."""
        return [
            Norm("norm1", undropped(self, "attn.proj.output_quant", "attn.proj_drop")),
            Norm("norm2", undropped(self, "mlp.fc2.output_quant", "mlp.drop2")),
        ]


def readers(module: nn.Module, name: str) -> tuple[str, ...]:
    """The layers, by their names, that read the input of an attention or an MLP called ``name``."""
    first = ("qkv", "q_proj", "k_proj", "v_proj", "fc1", "fc1_g", "fc1_x")
    inside = dict(module.get_submodule(name).named_children())
    return tuple(f"{name}.{layer}" for layer in first if isinstance(inside.get(layer), QuantLinear))


def undropped(module: nn.Module, site: str, *dropouts: str) -> str | None:
    """The site, where none of the dropouts between it and its reader changes values in training; else None."""
    rates = [getattr(module.get_submodule(name), "p", 0.0) for name in dropouts]
    return None if any(rates) else site


def scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    """A branch (B, N, C) times a learned factor for each channel (C,), where there is one."""
    return branch if gamma is None else gamma * branch
