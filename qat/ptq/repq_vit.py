"""RepQ-ViT (Li et al., ICCV 2023, arXiv 2212.08254): percentile ranges, and channel scales folded out of LayerNorms.

The output of a LayerNorm is calibrated channel by channel. Its scales s and zero points z are then replaced by their
means s~ and z~, and the difference is moved into the norm and the next layer: r = s / s~, t = s * (z - z~), see
`qat.ptq.norms`. With an integer z~ the codes stay what they were, bit for bit. Shapes: C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.progress import Progress
from qat.ptq.base import PTQMethod, uncalibrated
from qat.ptq.in_order import calibrate_in_order
from qat.ptq.norms import check_rewrites, fold, same_function
from qat.ptq.search import PERCENTILES, calibrate_by_percentiles_
from qat.quantizers import Layout, Quantizer, UniformQuantizer
from qat.ranges import Range, check_fields
from qat.sites.family import NormLink, family_of
from qat.sites.insert import WeightSite, weight_sites

CHECKED = 8  # images on which the float function is compared before and after


@dataclass
class RepQViT(PTQMethod):
    """Fills the recipes repq_vit and bitlog2_*: every site gets the percentile range with the least squared error.

    Args:
        shares: quantiles that are tried as the upper end of a range; the lower end is the quantile 1 - share.
    """

    shares: Sequence[Annotated[float, Range(above=0.5, high=1)]] = PERCENTILES

    changes_weights = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.shares:
            raise QatError("RepQViT: shares is empty: give quantiles above 0.5 and at most 1, such as 0.999")

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
        folded = {f"{reader}.weight_quant" for link in links for reader in link.readers}
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
            QatError: no LayerNorm is read by linear layers alone, or a reader has no input quantizer with a single
                zero point.
        """
        found = [link for link in family_of(model).norm_links(model) if link.readers]
        if not found:
            raise QatError(
                "RepQViT rewrites LayerNorms that linear layers read, and this model has none (an RmsNorm has no bias "
                "to rewrite): choose another method of calibration"
            )
        for reader in (reader for link in found for reader in link.readers):
            site = model.get_submodule(f"{reader}.input_quant")
            if not isinstance(site, Quantizer) or site.spec.per_channel() is None or site.layout.groups > 1:
                have = f"has {site.spec}" if isinstance(site, Quantizer) else "stays in floating point"
                raise QatError(
                    f"RepQViT needs Uniform, granularity tensor, at '{reader}.input_quant', which {have}: "
                    "take the recipe repq_vit, or another method"
                )
        return [link for link in found if not any(_input_site(model, name).calibrated for name in link.readers)]


@contextmanager
def channel_wise(model: nn.Module, links: Iterable[NormLink]) -> Iterator[dict[str, UniformQuantizer]]:
    """Put, inside the block, quantizers per channel behind the norms; yield them by the name of the norm."""
    kept = {name: _input_site(model, name) for link in links for name in link.readers}
    readers = {name: model.get_submodule(name) for name in kept}
    try:
        for name, linear in readers.items():
            linear.input_quant = _per_channel(kept[name], cast(int, linear.in_features))
        yield {link.norm: _input_site(model, link.readers[0]) for link in links}  # all readers see one tensor
    finally:
        for name, linear in readers.items():
            linear.input_quant = kept[name]


def _input_site(model: nn.Module, layer: str) -> UniformQuantizer:
    return cast(UniformQuantizer, model.get_submodule(f"{layer}.input_quant"))


def _per_channel(quantizer: UniformQuantizer, channels: int) -> UniformQuantizer:
    """A quantizer with the same codes that has a step and a zero point for each channel."""
    return quantizer.spec.per_channel().build(Layout(-1, channels, batched=True)).to(quantizer.step.device)


@torch.no_grad()
def reparameterize(model: nn.Module, link: NormLink, channels: UniformQuantizer) -> None:
    """Fold scales and zero points (C,) of the output of a norm into the norm and its readers.

    The quantizers of the readers get the means that are left (equations 5 to 8 of RepQ-ViT).
    """
    step, zero = channels.step.double(), channels.zero_point.double()
    for name in link.readers:
        mean_step, mean_zero = _input_site(model, name).set_affine_(step.mean(), zero.mean())
    fold(model, link, ratio=step / mean_step, shift=step * (zero - mean_zero))
