"""What ViT, EVA and BEiT share: tokens with positions, blocks on a residual stream, a pool and a head.

Shapes: B images, P patches (h x w of them), N tokens (patches and class, distillation and register tokens), C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from timm.layers import AttentionPoolLatent, GluMlp, Mlp, PatchEmbed, SwiGLU, resample_abs_pos_embed
from torch import Tensor, nn

from qat.errors import QatError
from qat.models.layers import QuantLayerNorm
from qat.models.pooling import QuantAttentionPool
from qat.models.stream import StreamBlock
from qat.sites.family import Family, NormLink, Unit
from qat.sites.insert import FloatSite, SiteBuilder

TOKENS = ("cls_token", "dist_token", "reg_token")  # in the order in which timm puts them before the patches
MLPS = (Mlp, GluMlp, SwiGLU)


def require(model: nn.Module, name: str, *kinds: type[nn.Module]) -> None:
    """Raise QatError where the submodule ``name`` is of none of the classes."""
    module = model.get_submodule(name)
    if type(module) not in kinds:
        known, verb = ", ".join(kind.__name__ for kind in kinds), "is" if len(kinds) == 1 else "are"
        raise QatError(f"{name} is a {type(module).__name__}: only timm's {known} {verb} reproduced")


class TokenFamily(Family):
    """Checks, LayerNorms and units of a model of tokens; a subclass names the classes that it replaces."""

    blocks: ClassVar[tuple[type[nn.Module], ...]]
    attentions: ClassVar[tuple[type[nn.Module], ...]]
    roots: ClassVar[tuple[type[nn.Module], ...]]  # subclasses of the float roots, with the sites of the embedding

    def check(self, model: Any) -> None:
        """Refuse, by name, a part that would compute products without a site."""
        require(model, "patch_embed", PatchEmbed)
        if getattr(model, "attn_pool", None) is not None:
            require(model, "attn_pool", AttentionPoolLatent)
        for i, block in enumerate(model.blocks):
            require(model, f"blocks.{i}", *self.blocks)
            for name, _ in block.named_modules():
                kinds = {"attn": self.attentions, "mlp": MLPS}.get(name.rpartition(".")[2])
                if kinds:
                    require(model, f"blocks.{i}.{name}", *kinds)

    def prepare(self, model: Any, site: SiteBuilder) -> None:
        """Sites on the tokens and on their positions, where there are positions, and on their sum."""
        C = model.embed_dim
        found: dict[str, nn.Module] = {}
        if model.pos_embed is not None:
            found["tokens_quant"] = site.activation("tokens_quant", channel=(-1, C))
            found["pos_embed_quant"] = site.weight("pos_embed_quant", channel=(-1, C))
        found["embed_quant"] = site.activation("embed_quant", channel=(-1, C))
        children = list(model._modules.items())
        first = 1 + [name for name, _ in children].index("patch_embed")
        for name, _ in children[first:]:
            del model._modules[name]
        for module in found.values():
            module.train(model.training)
        model._modules.update({**found, **dict(children[first:])})  # sites are listed in the order of the network
        (root,) = (root for root in self.roots if type(model) in root.__bases__)
        model.__class__ = root  # the only way to reach a sum inside a method of the root

    def norm_links(self, model: Any) -> list[NormLink]:
        """The LayerNorm before the blocks, those of every block, the last, and that of the pool."""
        links, before = [], "embed_quant"
        pre = getattr(model, "norm_pre", None)
        if isinstance(pre, QuantLayerNorm):
            links.append(NormLink("norm_pre", before, None))
        if hasattr(pre, "output_quant"):
            before = "norm_pre.output_quant"
        for i, block in enumerate(model.blocks):
            links += cast(StreamBlock, block).links(f"blocks.{i}", before)
            before = f"blocks.{i}.{block.last}"
        pool = getattr(model, "attn_pool", None)
        if isinstance(model.norm, QuantLayerNorm):
            alone = isinstance(pool, QuantAttentionPool) and pool.pos_embed is None
            links.append(NormLink("norm", before, "attn_pool.kv" if alone else None))
        return [*links, *(pool.links("attn_pool") if isinstance(pool, QuantAttentionPool) else [])]

    def units(self, model: Any) -> list[Unit]:
        """Embedding, every block, head."""
        parameters = tuple(name for name, _ in model.named_parameters(recurse=False))
        embedding = ("patch_embed", "tokens_quant", "pos_embed_quant", "embed_quant", "rope", "norm_pre")
        head = ("norm", "attn_pool", "fc_norm", "head", "head_dist")
        names = [f"blocks.{i}" for i in range(len(model.blocks))]
        return [
            Unit("embedding", lambda x: self.embed(model, x), _present(model, embedding), parameters),
            *(Unit(name, self.block(model, i), (name,)) for i, name in enumerate(names)),
            Unit("head", lambda x: model.forward_head(model.norm(x)), _present(model, head)),
        ]

    def embed(self, model: Any, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what the first block reads (B, N, C)."""
        raise NotImplementedError

    def block(self, model: Any, index: int) -> Callable[[Tensor], Tensor]:
        """A block as a function of the stream (B, N, C) alone."""
        return cast(Callable[[Tensor], Tensor], model.blocks[index])


def _present(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if isinstance(getattr(model, name, None), nn.Module))


class QuantEmbedding:
    """Sites in the embedding: [class, distillation and register tokens; patches] + positions."""

    embed_quant: nn.Module

    @property
    def float_tokens(self: Any) -> bool:
        """Whether timm's own method computes the sum, because neither side of it is quantized."""
        sites = [getattr(self, name, None) for name in ("tokens_quant", "pos_embed_quant")]
        return all(site is None or isinstance(site, FloatSite) for site in sites)

    def join(self: Any, x: Tensor) -> Tensor:
        """Patches (B, P, C), or (B, h, w, C), to tokens (B, N, C) with quantized positions, before dropout."""
        positions = None if self.pos_embed is None else self.pos_embed_quant(self.pos_embed)  # (1, N or P, C)
        bare = getattr(self, "no_embed_class", False)  # the other tokens have no position
        if x.ndim == 4 and positions is not None:  # images of any size
            prefix = 0 if bare else self.num_prefix_tokens
            positions = resample_abs_pos_embed(positions, x.shape[1:3], self.patch_embed.grid_size, prefix)
        x = x.flatten(1, -2)
        found = [getattr(self, name, None) for name in TOKENS]
        others = [token.expand(x.shape[0], -1, -1) for token in found if token is not None]
        if positions is None:
            return torch.cat([*others, x], 1)
        if bare:
            return torch.cat([*others, self.tokens_quant(x) + positions], 1)
        return cast(Tensor, self.tokens_quant(torch.cat([*others, x], 1)) + positions)
