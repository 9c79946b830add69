"""Which parameters a search tries for a quantizer: a first grid of points, then finer points around the best of them.

A point is a row of numbers for each group, by name. Shapes: K points, k kept points, G groups that share a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

Table = Mapping[str, Tensor]  # name of a parameter or buffer -> its candidates (K, G), or one row of them (G,)


class Space(ABC):
    """The points of one search.

    Args:
        first: the grid that the search starts from, numbers (K, G) by name.
    """

    def __init__(self, first: Table) -> None:
        self.first = first

    def near(self, kept: Table) -> Table | None:
        """Finer points (SPAWNED * k, G) around those that are kept (k, G); None where the grid has all points."""
        return None

    @abstractmethod
    def parameters(self, points: Table) -> Table:
        """Parameters of the quantizer (K, G), by name, for points (K, G)."""
