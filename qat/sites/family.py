"""What a model family tells the rest of the package about itself, beside the classes that it swaps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from qat.errors import QatError


class NormLink(NamedTuple):
    """A LayerNorm between what it reads and what reads it, each by its dotted name.

    Args:
        norm: the LayerNorm.
        source: the site whose tensor it normalizes; None where something else lies between.
        linear: the layer that alone reads its output; None where there is more than one reader, or none is linear.
    """

    norm: str
    source: str | None
    linear: str | None


class Unit(NamedTuple):
    """A part of a model that takes a tensor and gives the next part its input."""

    name: str
    run: Callable[[Tensor], Tensor]


class Family(ABC):
    """One family; a subclass is registered by `family` and has no state."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise QatError, by name, for an option of a float model that the family does not reproduce."""

    def prepare(self, model: Any, site: Any) -> None:  # noqa: B027  most families have nothing to do
        """Give the root of the model sites of its own, from a `SiteBuilder`, in place."""

    def norm_links(self, model: Any) -> list[NormLink]:
        """The LayerNorms of a quantized model, in the order of the network."""
        raise QatError(f"{type(model).__name__} does not list its LayerNorms: choose another method or recipe")

    def units(self, model: Any) -> list[Unit]:
        """The quantized model as a chain: applying all of them is applying the model, in evaluation mode."""
        raise QatError(f"{type(model).__name__} is not a chain of units: choose another method of calibration")


FAMILIES: dict[type[nn.Module], Family] = {}


def family(*roots: type[nn.Module]) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: models of the classes ``roots`` are of the decorated family."""

    def register(kind: type[Family]) -> type[Family]:
        FAMILIES.update(dict.fromkeys(roots, kind()))
        return kind

    return register


def family_of(model: nn.Module) -> Family:
    """The family of a float or a quantized model; QatError when it is of none."""
    for kind in type(model).__mro__:  # a quantized root may be a subclass of the float one
        if kind in FAMILIES:
            return FAMILIES[kind]
    known = ", ".join(sorted(root.__name__ for root in FAMILIES))
    raise QatError(f"{type(model).__name__} is not a model family that qat can quantize: it knows {known}")
