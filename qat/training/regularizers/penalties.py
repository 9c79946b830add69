"""The losses of all regularizers of a run on the weights of its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from qat.sites.insert import WeightSite
from qat.training.regularizers.base import Regularizer, named


class Penalties:
    """Regularizers, and the weights that each of them is for.

    Args:
        regularizers: those that the options list.
        model: the quantized model; QatError when a regularizer matches none of its weights.

    Attributes:
        sites: the weights of each regularizer, by its name.
    """

    def __init__(self, regularizers: Sequence[Regularizer], model: nn.Module) -> None:
        self.regularizers = named(regularizers)
        self.choose(model)

    def choose(self, model: nn.Module) -> None:
        """Choose the weights of each regularizer: those that the model has now."""
        self.sites: dict[str, list[WeightSite]] = {
            name: regularizer.choose(model) for name, regularizer in self.regularizers.items()
        }

    def at(self, progress: float) -> Iterator[tuple[str, Tensor]]:
        """Name and weighted loss of every regularizer whose weight is above zero by now; others are not computed.

        Args:
            progress: share of the training steps that are done, 0 to 1.
        """
        for name, regularizer in self.regularizers.items():
            if weight := regularizer.weight_at(progress):
                yield name, weight * regularizer.penalty(self.sites[name])
