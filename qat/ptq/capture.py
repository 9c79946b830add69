"""What reaches the sites of one unit of a model. Shapes: B images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from qat.sites.family import Unit
from qat.sites.hooks import watching


def capture(
    unit: Unit, tensors: Iterable[Tensor], sites: Mapping[str, nn.Module], keep: Callable[[str, Tensor], Tensor]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Run a unit on every batch: its outputs, and for every site that it reaches what is kept of the inputs.

    Args:
        unit: its sites are switched on or off as they shall be.
        tensors: inputs of the unit (B, ...).
        sites: quantized or float, by name; others than those of the unit may be among them.
        keep: what to keep, from the name of a site and its input.
    """
    found: dict[str, list[Tensor]] = {}

    def see(name: str, args: tuple[Tensor, ...]) -> None:
        found.setdefault(name, []).append(keep(name, args[0]))

    with watching(sites, before=see):
        return [unit.run(x) for x in tensors], found
