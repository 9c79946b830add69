"""Sites as ONNX operators, in modules that the torch exporter reads. Shapes: G groups that share a scale.

A product wants its operands as integers of one scale, because then runtimes multiply integers. A site therefore gives
`Parts`: values, a factor and an offset that are still to be applied; a product applies them where they can be moved
past it, and to its operand otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from qat.export.graph.grid import Grid, container_of

SITE = "qat.site"  # the name of the site, in the metadata of its node
FLOAT = "qat.float"  # marks a DequantizeLinear whose product is one of floats


class Folding(nn.Module):
    """A module with constants that are computed from others.

    Attributes:
        exact: the same constants in float64, by the name of their buffer, for the comparison in float64.
    """

    exact: dict[str, Tensor]

    def fold(self, name: str, value: Tensor) -> None:
        """Register a constant, given in float64."""
        if "exact" not in self.__dict__:
            self.exact = {}
        self.exact[name] = value
        self.register_buffer(name, value.float(), persistent=False)


def quantize_linear(x: Tensor, scale: Tensor, zero: Tensor, site: str) -> Tensor:
    """The operator QuantizeLinear with one scale."""
    return torch.onnx.ops.symbolic(
        "::QuantizeLinear", (x, scale, zero), {}, dtype=zero.dtype, shape=x.shape, metadata_props={SITE: site}
    )


def dequantize_linear(
    codes: Tensor, scale: Tensor, zero: Tensor, axis: int | None = None, mark: str | None = None
) -> Tensor:
    """The operator DequantizeLinear with one scale, or with one for each slice along an axis."""
    attributes: Any = {} if axis is None else {"axis": axis}
    return torch.onnx.ops.symbolic(
        "::DequantizeLinear", (codes, scale, zero), attributes, dtype=torch.float32, shape=codes.shape,
        metadata_props=None if mark is None else {mark: ""},
    )  # fmt: skip


def clip(codes: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """The operator Clip, on integers: torch's own clamp becomes operators that runtimes lack for uint8."""
    return torch.onnx.ops.symbolic("::Clip", (codes, least, most), {}, dtype=codes.dtype, shape=codes.shape)


class Parts(NamedTuple):
    """A tensor as values * factor + offset; None stands for 1 and for 0. Both broadcast over the values."""

    values: Tensor
    factor: Tensor | None = None
    offset: Tensor | None = None

    def whole(self) -> Tensor:
        """The tensor."""
        x = self.values if self.factor is None else self.values * self.factor
        return x if self.offset is None else x + self.offset


def parts_of(site: nn.Module, x: Tensor) -> Parts:
    """What a site gives; a site in floating point gives its input."""
    return site.parts(x) if isinstance(site, ActivationSite) else Parts(site(x))


class ActivationSite(nn.Module):
    """The site of an activation.

    With one scale it is QuantizeLinear, Clip where the container is wider than the codes, and DequantizeLinear. With
    several scales, or a container of 16 bits, which runtimes cannot clip, division and clip come first, and the scale
    of both operators is 1. Where no zero point of a container reaches the codes, it is rounded in floating point.

    Args:
        name: of the site.
        grid: of its values.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, name: str, grid: Grid) -> None:
        super().__init__()
        self.name, self.layout = name, grid.layout
        low, high = grid.ends
        self.container = container_of(low, high)
        one_end = bool((grid.low == low).all() and (grid.high == high).all())
        fills = self.container is not None and (low, high) == self.container.ends
        self.is_plain = grid.is_one and self.container is not None and (fills or self.container.kind == torch.uint8)
        self.register_buffer("scale", grid.scale[0] if grid.is_one else grid.scale)
        self.register_buffer("low", grid.low[0] if one_end else grid.low)
        self.register_buffer("high", grid.high[0] if one_end else grid.high)
        offset = grid.offset if grid.offset is None or not grid.is_one else grid.offset[0]
        self.register_buffer("offset", offset)
        self.register_buffer("one", torch.ones(()))
        if self.container is not None:
            kind, zero = self.container.kind, self.container.zero
            self.register_buffer("zero", torch.tensor(zero, dtype=kind))
            clips = self.is_plain and not fills
            self.register_buffer("least", torch.tensor(low + zero, dtype=kind) if clips else None)
            self.register_buffer("most", torch.tensor(high + zero, dtype=kind) if clips else None)

    def forward(self, x: Tensor) -> Tensor:
        """The values of the site."""
        return self.parts(x).whole()

    def parts(self, x: Tensor) -> Parts:
        """The values, with what is still to be applied to them."""
        offset = self._view(self.offset, x)
        x = x if offset is None else x - offset
        if self.is_plain:
            codes = quantize_linear(x, self.scale, self.zero, self.name)
            if self.least is not None:
                codes = clip(codes, cast(Any, self.least), cast(Any, self.most))
            return Parts(dequantize_linear(codes, self.scale, self.zero), None, offset)
        factor, low, high = (cast(Tensor, self._view(end, x)) for end in (self.scale, self.low, self.high))
        ratio = torch.minimum(torch.maximum(x / factor, low), high)
        if self.container is None:
            return Parts(ratio.round(), factor, offset)
        one = cast(Tensor, self.one)
        codes = quantize_linear(ratio, one, self.zero, self.name)
        return Parts(dequantize_linear(codes, one, self.zero), factor, offset)

    @property
    def gives_integers(self) -> bool:
        """Whether a product reads DequantizeLinear itself, of 8 bits: what runtimes have integer kernels for."""
        return self.is_plain and self.container is not None and self.container.kind == torch.uint8

    @property
    def movable(self) -> Tensor | None:
        """The factor of `parts` of a tensor (B, H, N, D), float64, if it is one or one for each head; None for 1."""
        if self.is_plain:
            return None
        return self.scale.double().view(-1, 1, 1) if self.scale.ndim else self.scale.double()

    def _view(self, values: Any, x: Tensor) -> Tensor | None:
        """One value for each group, shaped so that it broadcasts over x; a single value as it is."""
        return self.layout.view(values, x) if isinstance(values, Tensor) and values.ndim else values


class WeightCodes(Folding):
    """A weight as integers that DequantizeLinear turns into values.

    Args:
        weight: the tensor, as the site quantizes it.
        grid: of its values.
        flip: give the transpose, (I, O), that a product without a transposition reads.
        integers: the other operand of the product has integers too. Otherwise the graph must not have the weight as
            DequantizeLinear: onnxruntime would take it for a weight of a model of floats, and round the other operand.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    values: Tensor

    def __init__(self, weight: Tensor, grid: Grid, flip: bool = False, integers: bool = True) -> None:
        super().__init__()
        weight, self.mark = weight.detach(), None if integers else FLOAT
        n, scale, low = grid.integers(weight), grid.scale, grid.low
        bits = int((grid.high - low).max()).bit_length()
        self.axis = None if grid.is_one else grid.layout.axis % weight.ndim
        shape = [1] * weight.ndim
        if self.axis is not None:
            repeats = weight.shape[self.axis] // grid.layout.groups
            scale, low = scale.repeat_interleave(repeats), low.repeat_interleave(repeats)
            shape[self.axis] = -1
        zero = -(2.0 ** (bits - 1)) - low  # the codes n + zero are those of signed integers of so many bits
        self.fits = bits <= 8 and bool(((zero >= -128) & (zero <= 127)).all())
        if not self.fits:
            values = n.double() * scale.double().view(shape)
            if grid.offset is not None:
                values = values + grid.layout.view(grid.offset, weight).double()
            self.fold("values", self._flipped(values, flip))
            return
        self.register_buffer("codes", self._flipped((n + zero.view(shape)).to(torch.int8), flip))
        self.register_buffer("scale", scale[0] if grid.is_one else scale)
        self.register_buffer("zero", (zero[0] if grid.is_one else zero).to(torch.int8))
        offset = None if grid.offset is None else self._flipped(grid.layout.view(grid.offset, weight), flip)
        self.register_buffer("offset", offset)
        if flip and self.axis is not None:
            self.axis = 1 - self.axis

    @staticmethod
    def _flipped(x: Tensor, flip: bool) -> Tensor:
        return x.mT.contiguous() if flip and x.ndim == 2 else x.contiguous()

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """The values; the weight is not read."""
        if not self.fits:
            return self.values
        found = dequantize_linear(self.codes, self.scale, self.zero, self.axis, self.mark)
        offset: Tensor | None = cast(Any, self.offset)
        return found if offset is None else found + offset
