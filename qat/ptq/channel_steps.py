"""Steps of every channel while a unit is trained, which become one step afterwards (AIQViT and I&S-ViT as published).

`FoldNorms` moves the differences between channels into norms and weights at once. Here the readers of a norm first get
a step and a zero point for each channel, and these are folded when weights have been trained. Codes of activations are
the same before and after; weights change, so that those that have been rounded have to be rounded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from qat.ptq.channel_ranges import fit_channels, to_common_range
from qat.ptq.fold_norms import FoldNorms, common, input_site, per_channel, raise_unless_foldable, sites_of
from qat.ptq.norms import fold, unit_unchanged
from qat.ptq.step import Stage, Step
from qat.ptq.tensor_search import fit
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Work
from qat.quantizers import Layout
from qat.ranges import Range, check_fields
from qat.sites.family import NormLink, family_of


@dataclass
class SplitChannels(Step):
    """Every layer that reads a LayerNorm gets an input quantizer with a step for each channel, which stays as it is.

    Args:
        samples: values of each channel.
    """

    samples: Annotated[int, Range(1, 1_000_000_000)] = 2048

    stage = Stage.INITIALIZE
    comes_before = "FoldChannels"

    def __post_init__(self) -> None:
        check_fields(self)

    def begin(self, work: Work) -> None:
        """Refuse readers that have no Uniform with a single step."""
        found = [link for link in family_of(work.model).norm_links(work.model) if link.readers]
        raise_unless_foldable(work.model, found, "SplitChannels")
        self._links = [link for link in found if work.is_open(sites_of(link))]

    def unit(self, here: UnitWork) -> None:
        """Replace the input quantizers of the readers in a unit."""
        reached = here.wanted_activations()
        for link in self._links:
            names = [f"{reader}.input_quant" for reader in link.readers]
            if names[0] in reached:
                channels = per_channel(here.model, link.readers[0])
                fit_channels(channels, here.samples({names[0]: channels}, self.samples)[names[0]])
                for name, reader in zip(names, link.readers, strict=True):
                    own = per_channel(here.model, reader)
                    own.set_({"step": channels.step.detach(), "zero_point": channels.zero_point})
                    here.replace(name, own)
                    del here.work.wanted[name]  # so that no step moves it


@dataclass
class FoldChannels(Step):
    """Steps of channels become one, norms and weights make up for it, and these weights get new ranges."""

    stage = Stage.RECONSTRUCT
    changes_weights = True
    comes_after = "SplitChannels"

    def finish(self, here: UnitWork) -> None:
        """Fold the norms of a unit whose readers have steps of channels."""
        for link in split_links(here):
            channels = input_site(here.model, link.readers[0])
            for name in (f"{reader}.input_quant" for reader in link.readers):
                here.replace(name, here.work.recipe[name].build(Layout(0, 1, batched=True)).to(channels.step.device))
            step, zero = [common(channels, input_site(here.model, reader)) for reader in link.readers][-1]
            with unit_unchanged(here.unit, here.inputs[0][:1], here.off):
                fold(here.model, link, *to_common_range(channels, step, zero, strength=1))
            for site in here.wanted_weights():
                if site.name.removesuffix(".weight_quant") in link.readers:
                    fit(site.quantizer, site.quantizer.grouped(site.weight.detach().float()), levels=1)


def folded_later(steps: Sequence[Step]) -> list[Step]:
    """The steps with `SplitChannels` in the place of `FoldNorms`; `FoldChannels` has to follow them."""
    found = [SplitChannels() if isinstance(step, FoldNorms) else step for step in steps]
    return sorted(found, key=lambda step: step.stage)


def split_links(here: UnitWork) -> Iterator[NormLink]:
    """The norms whose readers, in a unit, have a step for each channel."""
    inside = tuple(f"{name}." for name in here.unit.modules)
    for link in family_of(here.model).norm_links(here.model):
        if link.readers and f"{link.readers[0]}.".startswith(inside):
            name = f"{link.readers[0]}.input_quant"
            if name in here.work.recipe and name not in here.work.wanted:  # `SplitChannels` has taken it
                yield link
