"""Puts quantizers into a model: replaces each known module by one with quantized sites.

A site is a place where a tensor may be quantized; its name is the dotted name of a submodule that is either a
`Quantizer` or, where no rule applies, a `FloatSite`. Replacements share the parameters of what they replace and keep
their names, so a float checkpoint loads before and a quantized one after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from torch import nn

from qat.errors import QatError
from qat.quantizers import Layout, Quantizer
from qat.quantizers.spec import MAX_BITS
from qat.recipe import Recipe, resolve
from qat.sites.family import FAMILIES, family_of

Cuts = Mapping[str, tuple[int, int]]  # granularity -> (axis, groups)


class FloatSite(nn.Identity):
    """A site that stays in floating point: the tensor passes through."""


Q = TypeVar("Q", bound=nn.Module)
SWAPS: dict[type[nn.Module], Callable[[Any, SiteBuilder], nn.Module]] = {}


def swaps(float_class: type[nn.Module]) -> Callable[[type[Q]], type[Q]]:
    """Class decorator: `quantize` replaces every module of exactly ``float_class`` by ``decorated(module, site)``.

    The decorated class shares the parameters of ``module`` and asks the `SiteBuilder` for its quantizers.
    """

    def register(quantized: type[Q]) -> type[Q]:
        SWAPS[float_class] = quantized
        return quantized

    return register


@dataclass
class SiteBuilder:
    """Builds the quantizer of each site and remembers which rules were used."""

    rules: Recipe
    prefix: str = ""
    names: list[str] = field(default_factory=list)
    used: set[int] = field(default_factory=set)

    def child(self, name: str) -> SiteBuilder:
        """The builder for the submodule ``name``."""
        return SiteBuilder(self.rules, f"{self.prefix}{name}.", self.names, self.used)

    def weight(self, name: str, **cuts: tuple[int, int]) -> Quantizer | FloatSite:
        """A site for a weight; ``cuts`` gives axis and groups of each granularity beyond ``tensor``."""
        return self._build(name, cuts, batched=False)

    def activation(self, name: str, **cuts: tuple[int, int]) -> Quantizer | FloatSite:
        """A site for a tensor whose first axis is the batch; ``cuts`` as in `weight`."""
        return self._build(name, cuts, batched=True)

    def _build(self, name: str, cuts: Cuts, batched: bool) -> Quantizer | FloatSite:
        site = self.prefix + name
        self.names.append(site)
        self.used.update(i for i, rule in enumerate(self.rules) if resolve([rule], site))
        rule = resolve(self.rules, site)
        if rule is None or rule.spec is None:
            return FloatSite()
        cuts = {"tensor": (0, 1), **cuts}
        if rule.spec.granularity not in cuts:
            raise QatError(
                f"rule {rule.match!r}: site {site!r} has no granularity {rule.spec.granularity!r}: "
                f"choose from {', '.join(cuts)}"
            )
        axis, groups = cuts[rule.spec.granularity]
        try:
            quantizer: Quantizer = rule.spec.build(Layout(axis, groups, batched))
            _check_place(quantizer, name)
        except QatError as error:
            raise QatError(f"rule {rule.match!r} at site {site!r}: {error}") from None
        return quantizer

    def raise_for_unused_rules(self, model: nn.Module) -> None:
        """Raise QatError for the first rule that matches no site of ``model``."""
        for i, rule in enumerate(self.rules):
            if i not in self.used and not rule.optional:
                if rule.match.startswith("head") and getattr(model, "num_classes", None) == 0:
                    raise QatError(
                        f"rule {rule.match!r} matches no site, because this model has no head: give "
                        "--model.num_classes N, and --model.fresh_head true where the weights have no head either"
                    )
                near = get_close_matches(rule.match, self.names, n=1, cutoff=0.0)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise QatError(f"rule {rule.match!r} matches no site{hint}; `qat describe` lists them all")


def _check_place(quantizer: Quantizer, name: str) -> None:
    """Raise QatError for a quantizer that makes no sense at a site of this name."""
    kind = type(quantizer.spec).__name__
    if quantizer.replaces_softmax and name != "probs_quant":
        raise QatError(f"{kind} takes the place of a softmax, so it belongs at a site probs_quant")
    if not quantizer.layout.batched and not quantizer.spec.holds_negatives:
        raise QatError(f"{kind} has no negative value here, and weights are negative too: choose signed codes")


def quantize(model: nn.Module, rules: Recipe) -> nn.Module:
    """Replace, in place, every known module of a timm model by its quantized form; parameters are shared.

    The steps are NaN until a `PTQMethod` fills them.

    Raises:
        QatError: the family or one of its options is not reproduced, or a rule matches no site or asks for a
            granularity that its site does not have.
    """
    kind = family_of(model)
    if type(model) not in FAMILIES:
        raise QatError(f"{type(model).__name__} is quantized already: build the float model again")
    kind.check(model)
    builder = SiteBuilder(rules)
    swap_children(model, builder)
    kind.prepare(model, builder)
    builder.raise_for_unused_rules(model)
    connect_norms(model)
    return model


def connect_norms(model: nn.Module) -> None:
    """Give every LayerNorm that computes with integers the quantizer of the tensor that it normalizes.

    Raises:
        QatError: that tensor has no single quantizer, or its values are not whole multiples of one step.
    """
    modules = dict(model.named_modules())
    integer = {name.removesuffix(".output_quant") for name, q in quantizers(model) if q.reads_integers}
    links = {link.norm: link.source for link in family_of(model).norm_links(model)} if integer else {}
    for name in sorted(integer):
        site = links.get(name)
        source = modules[site] if site else None
        if not isinstance(source, Quantizer) or not source.whole_steps:
            found = f"{site!r} is {source.spec if isinstance(source, Quantizer) else 'not quantized'}"
            raise QatError(
                f"site '{name}.output_quant': IntegerNorm reads whole numbers of steps, so what it normalizes must be "
                f"PTF, or Uniform with one step; {found if site else 'here it is no site'}: change that, or use Uniform"
            )
        modules[name].source = (source,)  # in a tuple: no submodule of the norm


def swap_children(module: nn.Module, site: SiteBuilder) -> None:
    """Replace the children of ``module``, from the top down; a replacement replaces its own children."""
    for name, child in list(module.named_children()):
        setattr(module, name, swapped(child, site.child(name)))


def swapped(module: nn.Module, site: SiteBuilder) -> nn.Module:
    """What replaces a float module; the module itself, with replaced children, where nothing does."""
    if type(module) in SWAPS:
        return SWAPS[type(module)](module, site).train(module.training)
    swap_children(module, site)
    return module


def sites(model: nn.Module) -> Iterator[tuple[str, Quantizer | FloatSite]]:
    """Every site of a model, by name, in the order of the module tree."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer | FloatSite):
            yield name, module


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantized site of a model, by name."""
    for name, module in sites(model):
        if isinstance(module, Quantizer):
            yield name, module


class WeightSite(NamedTuple):
    """A weight and the quantizer that it goes through."""

    name: str  # name of the site
    weight: nn.Parameter
    quantizer: Quantizer


def weights(model: nn.Module) -> Iterator[WeightSite]:
    """Every quantized weight of a model."""
    modules = dict(model.named_modules())
    for name, quantizer in quantizers(model):
        if not quantizer.layout.batched:
            parent, _, site = name.rpartition(".")
            yield WeightSite(name, getattr(modules[parent], site.removesuffix("_quant")), quantizer)


def weight_sites(model: nn.Module, match: str = "*", max_bits: int = MAX_BITS) -> list[WeightSite]:
    """The quantized weights whose site matches a glob and has at most ``max_bits``; QatError when there are none."""
    found = [site for site in weights(model) if fnmatchcase(site.name, match) and site.quantizer.spec.width <= max_bits]
    if not found:
        raise QatError(
            f"no quantized weight of at most {max_bits} bits matches {match!r}; `qat describe` lists the sites"
        )
    return found


@contextmanager
def switched_off(modules: Iterable[Quantizer]) -> Iterator[None]:
    """Let tensors pass the quantizers unchanged inside the block."""
    before = [(module, module.enabled) for module in modules]
    try:
        for module, _ in before:
            module.enabled = False
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled


def raise_for_uncalibrated(model: nn.Module) -> None:
    """Raise QatError while a quantizer has a NaN parameter."""
    missing = [name for name, quantizer in quantizers(model) if not quantizer.calibrated]
    if missing:
        raise QatError(
            f"{len(missing)} of {len(list(quantizers(model)))} quantizers are not calibrated, the first is "
            f"{missing[0]!r}: calibrate first (calibration.images > 0 with training images), or load a checkpoint"
        )
