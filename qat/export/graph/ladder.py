"""Any quantizer whose value rises with what it is given, as a table of thresholds. Shapes: G groups, L levels.

A logarithmic quantizer has no scale that QuantizeLinear could have. But the value of a site is a function of one
number, and it never falls: it is told by the L - 1 smallest numbers, float32, at which it reaches the next level. They
are found by bisection with the quantizer itself, so the table gives the very value that the quantizer gives, for every
float32. An input finds its level by comparing with the threshold in the middle, then with that in the middle of a half,
and so on: a table with 16 levels takes four comparisons.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QatError
from qat.quantizers import Quantizer

MOST_LEVELS = 2**9
TOP = 0x7F7FFFFF  # the largest float32, as an integer


def from_order(order: Tensor) -> Tensor:
    """The float32 at a place in the order of all of them: 0 is zero, negative places are negative numbers."""
    bits = torch.where(order < 0, order.abs() | 0x80000000, order)
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)  # as int32
    return bits.to(torch.int32).view(torch.float32)


@torch.no_grad()
def ladder(site: str, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """The thresholds (G, L - 1) and the values (G, L) of a quantizer, both rising.

    Raises:
        QatError: the site reads more than one number at a time, has too many levels, or its value falls somewhere.
    """
    spec, G = quantizer.spec, quantizer.layout.groups
    if quantizer.replaces_softmax or quantizer.reads_integers or spec.levels > MOST_LEVELS:
        raise QatError(
            f"site {site!r} has {spec}, for which there is no ONNX form: choose LSQ, Uniform or a logarithm of at most "
            "8 bits there, or --format safetensors"
        )
    ends = values_at(quantizer, torch.tensor([-3.0e38, 3.0e38]).expand(G, -1))
    codes = torch.arange(min(spec.qmin, 0), spec.levels + 1, dtype=torch.int32).expand(G, -1)
    found = decoded(quantizer, codes)
    rows = [row[(row >= low) & (row <= high)].unique() for row, (low, high) in zip(found, ends, strict=True)]
    L = max(map(len, rows))
    values = torch.stack([torch.cat([row, row[-1:].expand(L - len(row))]) for row in rows])
    low, high = torch.full((G, L - 1), -TOP), torch.full((G, L - 1), TOP)
    for _ in range(33):  # the answer is above low and at most high
        middle = low + (high - low) // 2
        reached = values_at(quantizer, from_order(middle)) >= values[:, 1:]
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    thresholds = from_order(high)
    below = torch.nextafter(thresholds, torch.tensor(-torch.inf))
    reach = max(1e-3, float(thresholds.abs().max())) if L > 1 else 1.0
    tried = torch.cat([thresholds, below, (thresholds + below.roll(-1, 1)) / 2], 1)
    tried = torch.cat([tried, torch.linspace(-1.5, 1.5, 4096).expand(G, -1) * reach], 1)
    places = torch.searchsorted(thresholds.contiguous(), tried.contiguous(), right=True)
    if not torch.equal(values.gather(1, places), values_at(quantizer, tried)):
        raise QatError(f"site {site!r} has {spec}, whose value falls somewhere: there is no ONNX form for it")
    return thresholds, values


def values_at(quantizer: Quantizer, x: Tensor) -> Tensor:
    """The values (G, n) of numbers (G, n), each row in its own group."""
    tensor, axis = as_site(quantizer, x)
    return from_site(quantizer(tensor).float(), axis, len(x))


def decoded(quantizer: Quantizer, codes: Tensor) -> Tensor:
    """The values (G, n) of codes (G, n); those that do not exist are left out by the caller."""
    legal = codes.clamp(quantizer.spec.qmin, quantizer.spec.qmin + quantizer.spec.levels - 1)
    tensor, axis = as_site(quantizer, legal)
    return from_site(quantizer.decode(tensor).float(), axis, len(codes))


def as_site(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, int]:
    """Rows (G, n) as a tensor (1, .., G, .., n) whose axis is that of the layout; a single group has any shape."""
    axis = quantizer.layout.axis if quantizer.layout.groups > 1 else 1
    tensor = x[None, :, None, :]  # (1, G, 1, n)
    return (tensor.movedim(1, axis) if axis % 4 != 1 else tensor).contiguous(), axis


def from_site(x: Tensor, axis: int, groups: int) -> Tensor:
    """The way back."""
    return (x.movedim(axis, 1) if axis % 4 != 1 else x).reshape(groups, -1)


class Table(nn.Module):
    """The same table for torch, in any precision; a comparison in float64 needs the thresholds of float32.

    Args:
        name: of the site.
        quantizer: calibrated.
    """

    thresholds: Tensor
    values: Tensor

    def __init__(self, name: str, quantizer: Quantizer) -> None:
        super().__init__()
        self.layout = quantizer.layout
        for key, value in zip(("thresholds", "values"), ladder(name, quantizer), strict=True):
            self.register_buffer(key, value.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The values of the site."""
        G, axis = len(self.values), self.layout.axis
        rows = x.reshape(1, -1) if G == 1 else x.movedim(axis, 0).reshape(G, -1)
        values = self.values.gather(1, torch.searchsorted(self.thresholds, rows.contiguous(), right=True))
        if G == 1:
            return values.view(x.shape)
        return values.view(x.movedim(axis, 0).shape).movedim(0, axis)


class LadderSite(Table):
    """The same table as operators of ONNX: a search among thresholds. The product that reads it is one of floats.

    The table is filled up to a power of two, so that every input takes the same number of comparisons.
    """

    def __init__(self, name: str, quantizer: Quantizer) -> None:
        super().__init__(name, quantizer)
        full = filled(self.thresholds)
        self.size = full.shape[1] + 1
        last = self.values[:, -1:].expand(-1, self.size - self.values.shape[1])
        self.register_buffer("thresholds", full)
        self.register_buffer("values", torch.cat([self.values, last], 1))
        self.register_buffer("group", torch.arange(len(full)))

    def forward(self, x: Tensor) -> Tensor:
        """The values of the site."""
        if len(self.values) == 1:
            return gather(self.values[0], places(x, self.thresholds[0]))
        group = self.layout.view(cast(Tensor, self.group), x)
        found = places(x, self.thresholds.flatten(), self.size, group)
        return gather(self.values.flatten(), found + group * self.size)


def filled(thresholds: Tensor) -> Tensor:
    """Rising thresholds (..., n), with infinity behind them up to one less than a power of two."""
    size = 2 ** max(1, thresholds.shape[-1].bit_length())
    return F.pad(thresholds, (0, size - 1 - thresholds.shape[-1]), value=torch.inf)


def places(x: Tensor, thresholds: Tensor, size: int | None = None, group: Tensor | None = None) -> Tensor:
    """How many thresholds each number reaches, int64.

    Args:
        x: numbers.
        thresholds: rising, (2**d - 1,); or those of every group behind each other.
        size: 2**d, where there are groups.
        group: of every number, broadcasts over x.
    """
    size = len(thresholds) + 1 if size is None else size
    half, first = size // 2, 0 if group is None else group * (size - 1)
    place = (x >= gather(thresholds, torch.as_tensor(first + (half - 1)))).long() * half
    while half > 1:
        half //= 2
        place = place + (x >= gather(thresholds, place + (half - 1) + first)).long() * half
    return place


def gather(table: Tensor, index: Tensor) -> Tensor:
    """The operator Gather: entries of a table (n,), in the shape of the index, int64."""
    return torch.onnx.ops.symbolic("::Gather", (table, index), {"axis": 0}, dtype=table.dtype, shape=index.shape)
