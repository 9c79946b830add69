"""What the steps of a calibration are given: the unit that they work on, and what reaches its sites.

Shapes: B images of a batch, G groups that share a step, n values in a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from qat.ptq.cache import Cache
from qat.ptq.layer_work import LayerWork
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.original_weights import OriginalWeights
from qat.ptq.work import SAMPLES, Prefix, Work, with_ends
from qat.quantizers import Quantizer
from qat.sites.family import Unit, family_of
from qat.sites.hooks import watching
from qat.sites.insert import FloatSite, WeightSite, quantizers, switched_off, weights

Visits = dict[str, list[Tensor]]  # by name of a site, the tensors of all its visits in one forward


class Reached(Exception):
    """Ends a forward at the last visit of the sites that are watched."""


class UnitWork:
    """The work on one unit.

    Args:
        work: that on the whole model.
        unit: a part of the model.
        inputs: what reaches it, for every batch (B, ...).
        float_inputs: what reaches it in the float model; None where no step asks for it.
        products: all products of the model.
        prefix: what the units before it give to it.
        cache: keeps its outputs; None for memory.
    """

    def __init__(
        self, work: Work, unit: Unit, inputs: Sequence[Tensor], float_inputs: Sequence[Tensor] | None,
        products: Sequence[MatrixProduct], prefix: Prefix, cache: Cache | None = None,
    ) -> None:  # fmt: skip
        self.work, self.unit, self.inputs, self.float_inputs, self.prefix = work, unit, inputs, float_inputs, prefix
        self.model, self.off = work.model, [quantizer for _, quantizer in quantizers(work.model)]
        self.float_outputs: Sequence[Tensor] | None = None
        self._cache, self._sizes = cache or Cache(), [len(x) for x in inputs]
        self.trainings = 0  # of the unit, so far
        self._layers: dict[str, LayerWork] = {}
        self.originals = OriginalWeights()
        sites = [name for product in products for name in product.activations]
        self.visits = self._count({name: self.model.get_submodule(name) for name in dict.fromkeys(sites)})
        order = {name: i for i, name in enumerate(self.visits)}
        here = [product for product in products if all(name in order for name in product.activations)]
        here = [product for product in here if {product.left, product.right} & work.wanted.keys()]
        self.products = sorted(here, key=lambda product: max(order[name] for name in product.activations))

    def _count(self, sites: Mapping[str, nn.Module]) -> Counter[str]:
        """How often the unit reaches each site, in the order in which it first does, measured on one image."""
        seen: Counter[str] = Counter()
        with watching(sites, before=lambda name, _: seen.update([name])), switched_off(self.off):
            self.unit.run(self.inputs[0][:1])
        return seen

    @property
    def index(self) -> int:
        """How many units come before this one."""
        return [unit.name for unit in self._units].index(self.unit.name)

    @property
    def is_last(self) -> bool:
        """Whether the output of the unit is that of the model."""
        return self._units[-1].name == self.unit.name

    @property
    def _units(self) -> list[Unit]:
        return family_of(self.model).units(self.model)

    def advance(self, note: Callable[[], str]) -> None:
        """Count a tick of a long step, and say a few words about it where they are shown."""
        self.work.progress.advance(1, lambda: f"{self.unit.name}, {note()}")

    def wanted_weights(self) -> list[WeightSite]:
        """The weights of the unit that are to be calibrated, those of layers and tables alike."""
        inside = tuple(f"{name}." for name in self.unit.modules)
        return [
            site for site in weights(self.model)
            if site.name in self.work.wanted and (site.name in self.unit.modules or site.name.startswith(inside))
        ]  # fmt: skip

    def wanted_activations(self) -> dict[str, Quantizer]:
        """The activation sites that the unit reaches and that are to be calibrated, in the order of the network."""
        wanted = {name: q for name, q in self.work.wanted.items() if q.layout.batched}
        return {name: wanted[name] for name in self._count(wanted)}

    def watched(self, names: Iterable[str], quantized: bool) -> Iterator[Visits]:
        """For each batch, what reaches the named sites.

        Args:
            names: sites of operands.
            quantized: the sites before them are on; otherwise all sites are off.
        """
        sites = {name: self.model.get_submodule(name) for name in names}
        for x in self.inputs:
            if quantized and self.prefix == "quantized":
                found = self._watch(sites, x)
            else:
                with switched_off(self.off), self.originals.restored():
                    found = self._watch(sites, x)
            yield found  # outside: whoever reads it calls sites and layers as they are

    def float_watched(self, names: Iterable[str]) -> Iterator[Visits]:
        """The same in the float model, with the weights that the layers had before steps changed them."""
        assert self.float_inputs is not None, "a step that reads the float model sets needs_float"
        sites = {name: self.model.get_submodule(name) for name in names}
        for x in self.float_inputs:
            with switched_off(self.off), self.originals.restored():
                found = self._watch(sites, x)
            yield found

    def _watch(self, sites: Mapping[str, nn.Module], x: Tensor) -> Visits:
        seen: Visits = {name: [] for name in sites}

        def see(name: str, args: tuple[Any, ...]) -> None:
            seen[name].append(args[0].detach())
            if all(len(seen[other]) == self.visits[other] for other in sites):
                raise Reached

        with watching(sites, before=see), suppress(Reached):
            self.unit.run(x)
        return seen

    @torch.no_grad()
    def in_order(self, sites: Mapping[str, Quantizer]) -> Iterator[tuple[Quantizer, Tensor]]:
        """Every site with all values (G, n) that reach it, for the caller to fill it from.

        A site is switched off until it is filled, so that it sees what the sites before it have quantized. One that a
        unit visits more than once gets the values of all visits; sites between two visits are still off then. Only the
        values of one site are held, so the unit runs again, up to the site, for each of them.

        Args:
            sites: those of the unit that are to be filled, in the order of the network.
        """
        self.visits |= self._count(sites)
        for quantizer in sites.values():
            quantizer.enabled = False
        for name, quantizer in sites.items():
            seen = [x for visits in self.watched([name], quantized=True) for x in visits[name]]
            yield quantizer, torch.cat([quantizer.grouped(x.float()) for x in seen], dim=1)
            quantizer.enabled = True

    def layer(self, product: MatrixProduct) -> LayerWork | None:
        """The layer of a product whose weight is to be calibrated; None for a product of activations."""
        if product.matrices.weight is None or product.right not in self.work.wanted:
            return None
        if product.left not in self._layers:
            name = product.right.rpartition(".")[0]
            self._layers[product.left] = LayerWork(name, self.model.get_submodule(name), product, self)
        return self._layers[product.left]

    def replace(self, name: str, quantizer: Quantizer) -> None:
        """Put another quantizer at a wanted site; where it is not that of the recipe, it becomes a rule of it."""
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, quantizer)
        self.work.wanted[name] = quantizer
        self.work.method.chosen[name] = quantizer.spec.to_dict()
        if quantizer.spec == self.work.recipe[name]:
            del self.work.method.chosen[name]
        self.off = [site for _, site in quantizers(self.model)]

    def leave_float(self, name: str) -> None:
        """Take the quantizer of a wanted site away; that becomes a rule of the recipe."""
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, FloatSite())
        del self.work.wanted[name]
        self.work.method.chosen[name] = None
        self.off = [site for _, site in quantizers(self.model)]

    def forget(self, product: MatrixProduct) -> None:
        """Let go of what was kept for a product."""
        self._layers.pop(product.left, None)

    def remember(self) -> None:
        """Keep, before steps change weights, what the unit computes in the float model, and its weights."""
        if self.float_inputs is not None:
            with switched_off(self.off):
                self.float_outputs = self._cache.keep(map(self.unit.run, self.float_inputs), self._sizes)
        elif self.prefix == "quantized":
            return
        for product in self.products:
            self.originals.keep(self.model, product)

    def outputs(self) -> Sequence[Tensor]:
        """What the unit gives to the next one."""
        if self.prefix == "quantized":
            return self._cache.keep(map(self.unit.run, self.inputs), self._sizes)
        with switched_off(self.off), self.originals.restored():
            return self._cache.keep(map(self.unit.run, self.inputs), self._sizes)

    @torch.no_grad()
    def start_rest(self) -> None:
        """Let every wanted site that no step has filled start by the ``init`` of its spec."""
        for _, weight, quantizer in self.wanted_weights():
            if not quantizer.calibrated:
                quantizer.init_from(quantizer.grouped(weight.float()))
        found = self.wanted_activations()
        self.work.reached.update(found)
        rest = {name: q for name, q in found.items() if not q.calibrated}
        for name, rows in self.samples(rest, SAMPLES).items():
            rest[name].init_from(rows)

    def samples(self, sites: Mapping[str, Quantizer], count: int) -> dict[str, Tensor]:
        """Values of each group (G, about ``count``) of what reaches the sites while all sites of the unit are off."""
        if not sites:
            return {}
        self.visits |= self._count(sites)
        rows: dict[str, list[Tensor]] = {name: [] for name in sites}
        part = ceil(count / len(self.inputs))
        for seen in self.watched(sites, quantized=False):
            for name, tensors in seen.items():
                rows[name] += [with_ends(sites[name].grouped(x.float()), part) for x in tensors]
        return {name: torch.cat(parts, dim=1) for name, parts in rows.items()}
