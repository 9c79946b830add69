"""RepQ-ViT (Li et al., ICCV 2023, arXiv 2212.08254): percentile ranges, and channel scales folded out of LayerNorms.

The output of a LayerNorm is calibrated channel by channel. Its scales s and zero points z are then replaced by their
means s~ and z~, and the difference is moved into the norm and the next layer: r = s / s~, t = s * (z - z~), see
`qat.ptq.norms`. With an integer z~ the codes stay what they were, bit for bit. Shapes: C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.progress import Progress
from qat.ptq.base import PTQMethod, uncalibrated
from qat.ptq.in_order import calibrate_in_order
from qat.ptq.norms import check_rewrites, fold, same_function
from qat.ptq.search import PERCENTILES, calibrate_by_percentiles_
from qat.quantizers import Layout, Quantizer, UniformQuantizer
from qat.sites.family import NormLink, family_of
from qat.sites.insert import WeightSite, weight_sites

CHECKED = 8  # images on which the float function is compared before and after


@dataclass
class RepQViT(PTQMethod):
    """Fills the recipes repq_vit and bitlog2_*: every site gets the percentile range with the least squared error.

    Args:
        shares: quantiles that are tried as the upper end of a range; the lower end is the quantile 1 - share.
    """

    shares: Sequence[float] = PERCENTILES

    changes_weights = True

    def __post_init__(self) -> None:
        if not self.shares or not all(0.5 < share <= 1 for share in self.shares):
            raise QatError(f"shares is {list(self.shares)}: give quantiles above 0.5 and at most 1, such as 0.999")

    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate weights, then activations in the order of the network; fold, and calibrate folded weights again."""
        links = self._links(model)
        images = list(batches)
        check_rewrites(model, links, images[0][:CHECKED])
        weights, activations = uncalibrated(model)
        with Progress("weights", len(weights), shown=bool(weights)) as progress:
            for site in weights:
                self._calibrate_weight(site)
                progress.advance(1)
        with channel_wise(model, links) as channels:
            calibrate_in_order(model, images, self._calibrate_site, activations)
        with same_function(model, images[0][:CHECKED]):
            for link in links:
                reparameterize(model, link, channels[link.norm])
        folded = {f"{link.linear}.weight_quant" for link in links}
        for site in weight_sites(model) if weights else ():
            if site.name in folded:
                self._calibrate_weight(site)

    def _calibrate_weight(self, site: WeightSite) -> None:
        self._calibrate_site(site.name, site.quantizer, site.quantizer.grouped(site.weight.float()))

    def _calibrate_site(self, name: str, quantizer: Quantizer, samples: Tensor) -> None:
        calibrate_by_percentiles_(quantizer, samples, self.shares)

    def _links(self, model: nn.Module) -> list[NormLink]:
        """The LayerNorms to rewrite: those whose reader is not calibrated yet.

        Raises:
            QatError: a reader has no input quantizer with a single zero point.
        """
        links = []
        for link in family_of(model).norm_links(model):
            if link.linear is None:
                continue
            site = model.get_submodule(f"{link.linear}.input_quant")
            if not isinstance(site, Quantizer) or site.spec.per_channel() is None or site.layout.groups > 1:
                have = f"has {site.spec}" if isinstance(site, Quantizer) else "stays in floating point"
                raise QatError(
                    f"RepQViT needs Uniform, granularity tensor, at '{link.linear}.input_quant', which {have}: "
                    "take the recipe repq_vit, or another method"
                )
            if not site.calibrated:
                links.append(link)
        return links


@contextmanager
def channel_wise(model: nn.Module, links: Iterable[NormLink]) -> Iterator[dict[str, UniformQuantizer]]:
    """Put, inside the block, quantizers per channel behind the norms; yield them by the name of the norm."""
    readers = {link.norm: model.get_submodule(cast(str, link.linear)) for link in links}
    kept = {norm: cast(UniformQuantizer, linear.input_quant) for norm, linear in readers.items()}
    try:
        channels = {}
        for norm, linear in readers.items():
            channels[norm] = linear.input_quant = _per_channel(kept[norm], cast(int, linear.in_features))
        yield channels
    finally:
        for norm, linear in readers.items():
            linear.input_quant = kept[norm]


def _per_channel(quantizer: UniformQuantizer, channels: int) -> UniformQuantizer:
    """A quantizer with the same codes that has a step and a zero point for each channel."""
    return quantizer.spec.per_channel().build(Layout(-1, channels, batched=True)).to(quantizer.step.device)


@torch.no_grad()
def reparameterize(model: nn.Module, link: NormLink, channels: UniformQuantizer) -> None:
    """Fold scales and zero points (C,) of the output of a norm into the norm and its reader.

    The quantizer of the reader gets the means that are left (equations 5 to 8 of RepQ-ViT).
    """
    site = cast(UniformQuantizer, model.get_submodule(f"{link.linear}.input_quant"))
    step, zero = channels.step.double(), channels.zero_point.double()
    mean_step, mean_zero = site.set_affine_(step.mean(), zero.mean())
    fold(model, link, ratio=step / mean_step, shift=step * (zero - mean_zero))
