"""How far a model that multiplies integers is from the one that simulates them.

In float64 both are the same function, but for the powers of `AdaLog`, which the simulation has in float32. In float32
they differ where a sum of products, which the simulation rounds at every addition and an integer accumulator does not,
falls next to the boundary of two codes. One such code
changes others behind it; so units are also compared one by one, each on what the simulation gives it. Codes that stand
for the same value, such as the two zeros of `TwinGelu`, count as equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.integer.modules import CodedSite, use_integers
from qat.quantizers import Quantizer
from qat.sites.family import family_of
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, weights

TINY = 1e-30  # logits can all be zero
Codes = dict[str, list[Tensor]]  # of every visit of a site, by its name


class Count(NamedTuple):
    """Codes that were compared, and those that differ."""

    codes: int
    unequal: int


@torch.no_grad()
def compare(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Compare the codes of every site of activations.

    Args:
        model: quantized and calibrated, in evaluation mode, in float32; it stays as it is.
        images: normalized (B, 3, S, S).

    Returns:
        images: B; float64: codes and how many are unequal; logit_difference_float64: as a share of the largest logit;
        units: codes, and unequal ones, where every unit reads what the simulation gives it, by the name of the unit,
        empty for a family that is no chain of units; float32: codes and unequal ones of whole models; same_class: share
        of the images.
    """
    exact = copy.deepcopy(model)
    for site in weights(exact):  # in float64, ties fall otherwise: codes of weights are those of float32
        site.weight.copy_(site.quantizer(site.weight))
    integer, exact = use_integers(copy.deepcopy(model)), exact.double()
    integer_exact = use_integers(copy.deepcopy(exact))
    doubles = images.double()
    double = _count(exact, integer_exact, lambda one: one(doubles))
    ours, theirs = exact(doubles), integer_exact(doubles)
    single = _count(model, integer, lambda one: one(images))
    return {
        "images": len(images),
        "float64": double._asdict(),
        "logit_difference_float64": float((ours - theirs).abs().max() / ours.abs().max().clamp(min=TINY)),
        "units": {name: found._asdict() for name, found in _by_unit(model, integer, images)},
        "float32": single._asdict(),
        "same_class": float((model(images).argmax(1) == integer(images).argmax(1)).float().mean()),
    }


def _by_unit(model: nn.Module, integer: nn.Module, x: Tensor) -> Iterator[tuple[str, Count]]:
    """Each unit on what the simulation gives it, with the codes that the site at the end of the unit before gave."""
    try:
        ours, theirs = (family_of(one).units(one) for one in (model, integer))
    except QatError:  # the family is no chain
        return
    closing: list[tuple[str, Tensor]] = []

    def note(name: str, args: tuple[Any, ...], out: Tensor) -> None:
        closing.append((name, out))

    given = x
    for mine, other in zip(ours, theirs, strict=True):
        with watching({name: q for name, q in quantizers(model) if q.layout.batched}, after=note):
            following = mine.run(x)
        name, out = closing[-1] if closing else ("", x)
        yield mine.name, _count(model, integer, lambda one: mine.run(x) if one is model else other.run(given))  # noqa: B023
        x = given = following
        if name and out.shape == x.shape and torch.equal(out, x):
            site: Any = integer.get_submodule(name)
            given = site.coded(x) if isinstance(site, CodedSite) else x


def _count(ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module], Tensor]) -> Count:
    """The codes that both models have in a forward."""
    names: dict[str, Quantizer] = {name: q for name, q in quantizers(ours) if q.layout.batched}
    with _codes(ours, names) as mine:
        run(ours)
    with _codes(theirs, names) as other:
        run(theirs)
    visits = [(names[name], a, b) for name in mine for a, b in zip(mine[name], other[name], strict=True)]
    return Count(sum(a.numel() for _, a, _ in visits), sum(_different(*visit) for visit in visits))


def _different(quantizer: Quantizer, a: Tensor, b: Tensor) -> int:
    """How many codes stand for another value."""
    return 0 if torch.equal(a, b) else int((quantizer.decode(a) != quantizer.decode(b)).sum())


@contextmanager
def _codes(model: nn.Module, names: Iterable[str]) -> Iterator[Codes]:
    """The codes of every site that a forward inside the block reaches."""
    found: Codes = {name: [] for name in names}

    def note(name: str, args: tuple[Any, ...]) -> None:
        site: Any = model.get_submodule(name)
        found[name].append(getattr(site, "quantizer", site).encode(*args))

    with watching({name: model.get_submodule(name) for name in names}, before=note):
        yield found
