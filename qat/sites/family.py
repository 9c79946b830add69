"""What a model family states about itself, beside the classes that replace its modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from qat.errors import QatError


class NormLink(NamedTuple):
    """A LayerNorm between what it reads and what reads it, each by its dotted name.

    Args:
        norm: the LayerNorm.
        source: the site whose tensor it normalizes; None where there is more than one, or an operation lies between.
        linear: the layer that reads its output; None where a reader is not linear, or is the head, whose input no
            method rewrites.
        others: further linear layers that read it.
    """

    norm: str
    source: str | None
    linear: str | None
    others: tuple[str, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """All linear layers that read the output, if nothing else does."""
        return () if self.linear is None else (self.linear, *self.others)


class Unit(NamedTuple):
    """A part of a model that takes a tensor and gives the next part its input.

    Args:
        name: how messages call it.
        run: from the input of the part to its output.
        modules: dotted names of the modules that belong to it, with all that they contain.
        parameters: dotted names of parameters that belong to it and are in none of these modules.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def named_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Dotted name and parameter of everything in the unit that can be trained, steps of quantizers included."""
        for name in self.parameters:
            yield name, model.get_parameter(name)
        for name in self.modules:
            for inner, parameter in model.get_submodule(name).named_parameters():
                yield f"{name}.{inner}", parameter


class Stream(NamedTuple):
    """A residual stream (..., C) that nothing reads but LayerNorms, which linear layers with a bias read.

    Args:
        parameters: dotted names of what is added to the stream, (..., C) each.
        writers: layers whose outputs are added to it.
        scales: for some writers, the parameter (C,) that their output is multiplied by (LayerScale), by their names.
        norms: each LayerNorm that reads it, with the layers that read the norm.
    """

    parameters: tuple[str, ...]
    writers: tuple[str, ...]
    scales: Mapping[str, str]
    norms: tuple[tuple[str, tuple[str, ...]], ...]


class Family(ABC):
    """A model family. A subclass has no state and is registered by `family`."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise QatError, by name, for an option of a float model that the family does not reproduce."""

    def prepare(self, model: Any, site: Any) -> None:  # noqa: B027  most families have nothing to do
        """Give the root of the model sites outside of its children, from a `SiteBuilder`, in place."""

    def norm_links(self, model: Any) -> list[NormLink]:
        """The LayerNorms of a quantized model, in the order of the network."""
        raise QatError(f"{type(model).__name__} does not list its LayerNorms: choose another method or recipe")

    def stream(self, model: Any) -> Stream | None:
        """The residual stream of a float or quantized model; None where it is none, or not the only one."""
        return None

    def units(self, model: Any) -> list[Unit]:
        """The quantized model as a chain: in evaluation mode, applying them in turn is applying the model.

        Every parameter belongs to exactly one unit.
        """
        raise QatError(f"{type(model).__name__} is not a chain of units: choose another method of calibration")


FAMILIES: dict[type[nn.Module], Family] = {}


def family(*roots: type[nn.Module]) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: models of the classes ``roots`` belong to the decorated family."""

    def register(kind: type[Family]) -> type[Family]:
        FAMILIES.update(dict.fromkeys(roots, kind()))
        return kind

    return register


def family_of(model: nn.Module) -> Family:
    """The family of a float or a quantized model; QatError where it belongs to none."""
    for kind in type(model).__mro__:  # a quantized root may be a subclass of the float one
        if kind in FAMILIES:
            return FAMILIES[kind]
    known = ", ".join(sorted(root.__name__ for root in FAMILIES))
    raise QatError(f"{type(model).__name__} is not a model family that qat can quantize: it knows {known}")
