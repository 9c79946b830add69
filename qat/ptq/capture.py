"""What reaches the sites of one unit of a model. Shapes: B images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from qat.family import Unit
from qat.ptq.base import watching
from qat.quantizers import Quantizer


def capture(
    unit: Unit, tensors: Iterable[Tensor], sites: Mapping[str, nn.Module], keep: Callable[[str, Tensor], Tensor]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Run a unit on every batch: its outputs, and for every site that it reaches what is kept of the inputs.

    Args:
        unit: its sites are switched on or off as they shall be.
        tensors: inputs of the unit (B, ...).
        sites: quantised or float, by name; others than those of the unit may be among them.
        keep: what to keep, from the name of a site and its input.
    """
    found: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        found.setdefault(name, []).append(keep(name, x))

    with watching(cast(Mapping[str, Quantizer], sites), see):  # a float site has inputs too
        return [unit.run(x) for x in tensors], found
