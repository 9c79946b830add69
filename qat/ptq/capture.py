"""Keeps the outputs of one unit of a model, and the tensors that reach its sites. Shapes: B images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from qat.sites.family import Unit
from qat.sites.hooks import watching


def capture(
    unit: Unit, tensors: Iterable[Tensor], sites: Mapping[str, nn.Module], keep: Callable[[str, Tensor], Tensor]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Run a unit on every batch; return its outputs and, by name of each site that it reaches, what was kept there.

    A site that is visited more than once has an entry for each visit. Gradients are recorded where the caller enables
    them.

    Args:
        unit: is run with its sites switched as they are.
        tensors: inputs of the unit (B, ...).
        sites: quantized or float, by name; sites that the unit does not reach get no entry.
        keep: from the name of a site and its input to what is kept of it.
    """
    found: dict[str, list[Tensor]] = {}

    def see(name: str, args: tuple[Tensor, ...]) -> None:
        found.setdefault(name, []).append(keep(name, args[0]))

    with watching(sites, before=see):
        return [unit.run(x) for x in tensors], found
