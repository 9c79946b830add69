"""What tells the official files of one family of models from those of another. Shapes: C channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from qat.errors import QatError

Table = Mapping[str, Tensor]
Sizes = Mapping[tuple[int, int], str]
Places = Mapping[str, tuple[str, ...]]  # site -> the quantizers of VVTQ that give its steps

SPLIT = ("proj_q", "proj_k", "proj_v")  # rows of timm's qkv, in this order
ATTENTION: Places = {
    "attn.qkv.input_quant": ("attn.quant_input",),
    "attn.qkv.weight_quant": tuple(f"attn.{name}" for name in SPLIT),
    "attn.q_quant": ("attn.quant_q",),
    "attn.k_quant": ("attn.quant_k",),
    "attn.v_quant": ("attn.quant_v",),
    "attn.probs_quant": ("attn.quant_attn",),
    "attn.proj.input_quant": ("attn.quant_output",),  # there before the heads are merged: one step cannot tell
    "attn.proj.weight_quant": ("attn.proj",),
}
MLP: Places = {
    "mlp.fc1.input_quant": ("mlp.quant1",),
    "mlp.fc1.weight_quant": ("mlp.fc1",),
    "mlp.fc2.input_quant": ("mlp.quant2",),
    "mlp.fc2.weight_quant": ("mlp.fc2",),
}
PARTS = {"attn.qkv.weight": ATTENTION, "mlp.fc1.weight": MLP}  # the parameter by which a part of a block is known


class Family(ABC):
    """The names of a family: what is stored where, what twice, and what without need.

    Attributes:
        mark: how one of the names in a file starts.
        prefix: how timm's names of the models start.
        archs: timm's name by what `measure` finds.
        outside: the sites outside the blocks, always of 8 bits.
        trained: those of them whose width VVTQ trains, by accident.
        unused: quantizers that a file has and that its network never calls.
        rules: what recipe ``vvtq`` quantizes and VVTQ does not.
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
        """Two numbers that tell the size of a model, 0 where the name to read them from is missing."""

    @abstractmethod
    def refusal(self, measured: tuple[int, int]) -> str:
        """What to say of a size that is not in `archs`."""

    def tell(self, table: Table) -> str:
        """The timm name of the model that a file holds; QatError for another size."""
        measured = self.measure(table)
        if measured not in self.archs:
            raise QatError(self.refusal(measured))
        return self.archs[measured]

    def rename(self, name: str) -> str:
        """Our name of a weight, or the beginning of names up to a dot, in the words of the file."""
        return name

    def names(self, name: str) -> tuple[str, ...]:
        """All names that a file has for the tensor that it calls ``name``, that one first."""
        return (name,)

    def constants(self, arch: str) -> Table:
        """What a file has by name and a model computes."""
        return {}

    def remark(self, split: bool) -> str:
        """What the names of float weights, with one projection or three, cannot tell; may be empty."""
        return ""

    def places(self, weights: Table) -> Places:
        """Every site that VVTQ quantizes, in a model with these weights of ours."""
        found = [(name.removesuffix(end), PARTS[end]) for name in weights for end in PARTS if name.endswith(f".{end}")]
        pairs = [(block, site, sources) for block, part in found for site, sources in part.items()]
        inside = {block + site: tuple(self.rename(block) + q for q in sources) for block, site, sources in pairs}
        return {**self.outside, **inside}
