"""Scales of every channel, folded out of LayerNorms: RepQ-ViT (Li et al., ICCV 2023, arXiv 2212.08254).

The output of a LayerNorm is calibrated channel by channel. Its scales s and zero points z are then replaced by their
means s~ and z~, and the difference is moved into the norm and the next layer: r = s / s~, t = s * (z - z~), see
`qat.ptq.norms`. With an integer z~ the codes stay what they were, bit for bit. Shapes: C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.channel_ranges import best_strength, fit_channels, to_common_range
from qat.ptq.norms import fold
from qat.ptq.search import calibrate_by_percentiles_
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Work
from qat.quantizers import Layout, Quantizer, UniformQuantizer
from qat.ranges import Range, check_fields
from qat.sites.family import NormLink, family_of


@dataclass
class FoldNorms(Step):
    """Every LayerNorm that linear layers read gets a new scale and shift for each channel; the layers undo them.

    The input sites of these layers start from the means s~ and z~.

    Args:
        shares: quantiles that are tried as the upper end of the range of a channel, as RepQ-ViT does; null tries the
            ranges of the output search.
        samples: values of each channel.
        optional: norms whose readers have no Uniform with a single step are left as they are; otherwise such a reader,
            and a model without a norm to fold, is refused.
        strength: power of the ratios of the channels' scales: 1 moves all of their differences to the weights, as
            RepQ-ViT does, 0 none; null searches for each norm, by the error of the layers that read it.
    """

    shares: Sequence[Annotated[float, Range(above=0.5, high=1)]] | None = None
    samples: Annotated[int, Range(1, 1_000_000_000)] = 2048
    optional: bool = False
    strength: Annotated[float, Range(low=0, high=1)] | None = 1.0

    stage = Stage.REWRITE
    changes_weights = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shares is not None and not self.shares:
            raise QatError("FoldNorms: shares is empty: give quantiles above 0.5 and at most 1, such as 0.999, or null")

    def begin(self, work: Work) -> None:
        """Find the norms to rewrite; QatError where one that has to be rewritten cannot be."""
        found = [link for link in family_of(work.model).norm_links(work.model) if link.readers]
        if not self.optional:
            raise_unless_foldable(work.model, found)
        self._links = [link for link in found if foldable(work.model, link) and work.is_open(sites_of(link))]

    def unit(self, here: UnitWork) -> None:
        """Rewrite the norms of a unit."""
        reached = here.wanted_activations()
        links = [link for link in self._links if f"{link.readers[0]}.input_quant" in reached]
        channels = {link.norm: per_channel(here.model, link.readers[0]) for link in links}
        names = {link.norm: f"{link.readers[0]}.input_quant" for link in links}  # all readers see one tensor
        found = here.samples({names[norm]: quantizer for norm, quantizer in channels.items()}, self.samples)
        for link in links:
            rows = found[names[link.norm]]
            self._calibrate(channels[link.norm], rows)
            strength = self.strength
            if strength is None:
                strength = best_for(here.model, link, channels[link.norm], rows.T)
            reparameterize(here.model, link, channels[link.norm], strength)

    def _calibrate(self, quantizer: UniformQuantizer, rows: Tensor) -> None:
        if self.shares is None:
            fit_channels(quantizer, rows)
        else:
            calibrate_by_percentiles_(quantizer, rows, self.shares)


def sites_of(link: NormLink) -> list[str]:
    """The sites of inputs and weights of all readers of a norm."""
    return [f"{reader}.{side}_quant" for reader in link.readers for side in ("input", "weight")]


def foldable(model: nn.Module, link: NormLink) -> bool:
    """Whether every reader has an input quantizer with a single step and zero point."""
    sites = [model.get_submodule(f"{reader}.input_quant") for reader in link.readers]
    return all(isinstance(q, Quantizer) and q.spec.per_channel() is not None and q.layout.groups == 1 for q in sites)


def raise_unless_foldable(model: nn.Module, links: Sequence[NormLink], step: str = "FoldNorms") -> None:
    """Raise QatError where a step has no norm to fold, or a reader has no quantizer that allows it."""
    if not links:
        raise QatError(
            f"{step} rewrites LayerNorms that linear layers read, and this model has none (an RmsNorm has no bias "
            "to rewrite): choose another method of calibration"
        )
    for link in links:
        if not foldable(model, link):
            name = f"{link.readers[0]}.input_quant"
            site = model.get_submodule(name)
            have = f"has {site.spec}" if isinstance(site, Quantizer) else "stays in floating point"
            raise QatError(
                f"{step} needs Uniform, granularity tensor, at {name!r}, which {have}: take the recipe repq_vit or "
                "frontier, or another method"
            )


def per_channel(model: nn.Module, reader: str) -> UniformQuantizer:
    """A quantizer with the codes of the input site of a layer that has a step and a zero point for each channel."""
    layer, site = model.get_submodule(reader), input_site(model, reader)
    layout = Layout(-1, cast(int, layer.in_features), batched=True)
    return site.spec.per_channel().build(layout).to(site.step.device)


def input_site(model: nn.Module, layer: str) -> UniformQuantizer:
    """The quantizer of the input of a layer."""
    return cast(UniformQuantizer, model.get_submodule(f"{layer}.input_quant"))


def best_for(model: nn.Module, link: NormLink, channels: UniformQuantizer, rows: Tensor) -> float:
    """The best strength for a norm, on rows of its output (n, C)."""
    site = input_site(model, link.readers[0])
    layers = [model.get_submodule(name) for name in link.readers]
    return best_strength(channels, *common(channels, site), rows, site, layers)


def common(channels: UniformQuantizer, site: UniformQuantizer) -> tuple[Tensor, Tensor]:
    """The means of steps and zero points, float64, which a site is given (equation 5 of RepQ-ViT)."""
    zero, spec = channels.zero_point.double(), channels.spec
    inside = (zero >= spec.qmin - spec.levels) & (zero <= spec.qmax + spec.levels)  # of no almost constant channel
    return site.set_affine_(channels.step.double().mean(), (zero[inside] if inside.any() else zero).mean())


@torch.no_grad()
def reparameterize(model: nn.Module, link: NormLink, channels: UniformQuantizer, strength: float = 1.0) -> None:
    """Fold scales and zero points (C,) of the output of a norm into the norm and its readers.

    The quantizers of the readers get the means that are left (equations 5 to 8 of RepQ-ViT).

    Args:
        model: has the norm and the readers.
        link: names them.
        channels: a step and a zero point for each channel.
        strength: power of the ratios.
    """
    step, zero = [common(channels, input_site(model, name)) for name in link.readers][-1]
    fold(model, link, *to_common_range(channels, step, zero, strength))
