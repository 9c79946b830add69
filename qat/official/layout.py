"""How the official files of one model family name their weights, and where they differ from ours. C is channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from qat.errors import QatError

Table = Mapping[str, Tensor]
Sizes = Mapping[tuple[int, int], str]
Places = Mapping[str, tuple[str, ...]]  # our site -> the quantizers of VVTQ whose steps it takes

SPLIT = ("proj_q", "proj_k", "proj_v")  # their rows make up timm's qkv, in this order
ATTENTION: Places = {
    "attn.qkv.input_quant": ("attn.quant_input",),
    "attn.qkv.weight_quant": tuple(f"attn.{name}" for name in SPLIT),
    "attn.q_quant": ("attn.quant_q",),
    "attn.k_quant": ("attn.quant_k",),
    "attn.v_quant": ("attn.quant_v",),
    "attn.probs_quant": ("attn.quant_attn",),
    "attn.proj.input_quant": ("attn.quant_output",),  # VVTQ applies it before it merges the heads: same values
    "attn.proj.weight_quant": ("attn.proj",),
}
MLP: Places = {
    "mlp.fc1.input_quant": ("mlp.quant1",),
    "mlp.fc1.weight_quant": ("mlp.fc1",),
    "mlp.fc2.input_quant": ("mlp.quant2",),
    "mlp.fc2.weight_quant": ("mlp.fc2",),
}
PARTS = {"attn.qkv.weight": ATTENTION, "mlp.fc1.weight": MLP}  # a block has a part if it has this parameter


class OfficialLayout(ABC):
    """The names in the official files of one model family.

    Attributes:
        mark: a file belongs to this family if one of its names starts with this.
        prefix: timm's names of the models start with this.
        archs: the timm name for each result of `measure`.
        outside: the sites outside the blocks, always of 8 bits.
        trained: those of them whose width VVTQ trains, by accident.
        unused: quantizers that are in a file but that VVTQ's network never calls.
        rules: rules that turn off what recipe ``vvtq`` quantizes and VVTQ does not.
    """

    mark: ClassVar[str]
    prefix: ClassVar[str]
    archs: ClassVar[Sizes]
    outside: ClassVar[Places]
    trained: ClassVar[tuple[str, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[tuple[dict[str, Any], ...]] = ()

    @abstractmethod
    def measure(self, table: Table) -> tuple[int, int]:
        """Two numbers that identify the size of a model; 0 where the name to read one from is missing."""

    @abstractmethod
    def refusal(self, measured: tuple[int, int]) -> str:
        """The error message for a size that is not in `archs`."""

    def find_arch(self, table: Table) -> str:
        """The timm name of the model that a file holds; QatError for a size that is not in `archs`."""
        measured = self.measure(table)
        if measured not in self.archs:
            raise QatError(self.refusal(measured))
        return self.archs[measured]

    def rename(self, name: str) -> str:
        """The name in the file of one of our weights; ``name`` may also be a prefix that ends with a dot."""
        return name

    def names(self, name: str) -> tuple[str, ...]:
        """All names under which a file stores the tensor ``name``, which comes first."""
        return (name,)

    def constants(self, arch: str) -> Table:
        """Tensors that a file stores although our model computes them."""
        return {}

    def remark(self, split: bool) -> str:
        """A warning about what the names of float weights cannot show; empty if there is none.

        Args:
            split: q, k and v have a projection each.
        """
        return ""

    def places(self, weights: Table) -> Places:
        """Every site that VVTQ quantizes in our model with these weights."""
        found = [(name.removesuffix(end), PARTS[end]) for name in weights for end in PARTS if name.endswith(f".{end}")]
        pairs = [(block, site, sources) for block, part in found for site, sources in part.items()]
        inside = {block + site: tuple(self.rename(block) + q for q in sources) for block, site, sources in pairs}
        return {**self.outside, **inside}
