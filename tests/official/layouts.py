"""What all official layouts share, written by hand: weights from a formula, VVTQ's quantizers and its layers.

The official code computed the constants LOGITS of each family in float64, from weights of the same formula. They prove
that the forward passes written here are right; these then prove that the converted models are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QatError
from qat.official import convert
from qat.sites.insert import quantizers, raise_for_uncalibrated
from tests import formula

Table = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
UNSIGNED = (".quant_attn", ".mlp.quant2")
CLASSES = 1000


def with_biases(layers: Shapes) -> Shapes:
    """Add the shapes of the biases to those of the weights."""
    kinds = {f"{name}.weight": shape for name, shape in layers.items()}
    return kinds | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def block(at: str, C: int, hidden: int) -> Shapes:
    """The shapes in a block of VVTQ, where q, k and v have a projection each."""
    layers: Shapes = {f"{at}.{name}": (C,) for name in ("norm1", "norm2")}
    layers |= {f"{at}.attn.{name}": (C, C) for name in ("proj_q", "proj_k", "proj_v", "proj")}
    return with_biases(layers | {f"{at}.mlp.fc1": (hidden, C), f"{at}.mlp.fc2": (C, hidden)})


def filled(shapes: Shapes) -> Table:
    """Float weights in float64; the formula takes the place of each name in their sorted order."""
    return {name: formula.filled(name, shapes[name], t) for t, name in enumerate(sorted(shapes))}


def fused(table: Table) -> Table:
    """The official layout of float weights: one projection for q, k and v."""
    out = {name: value for name, value in table.items() if ".attn.proj_" not in name}
    for name in table:
        if ".attn.proj_q." in name:
            out[name.replace("proj_q", "qkv")] = torch.cat([table[name.replace("proj_q", f"proj_{x}")] for x in "qkv"])
    return out


def float32(table: Table) -> Table:
    """The table as a file holds it: no float64, and no tensor under two names."""
    return {name: value.float() if value.is_floating_point() else value.clone() for name, value in table.items()}


def owners(table: Table, others: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of VVTQ's quantizers of weights, and of activations; ``others`` are those outside the blocks."""
    linear = [name.removesuffix(".weight") for name, value in table.items() if value.ndim > 1 and "weight" in name]
    activations = [*others]
    for name in linear:
        at, _, layer = name.rpartition(".")
        if layer == "proj_q":
            activations += [f"{at}.quant_{x}" for x in ("input", "q", "k", "v", "attn", "output")]
        elif layer == "fc1":
            activations += [f"{at}.quant{x}" for x in (1, 2)]
    return linear, activations


def quantized(table: Table, others: Iterable[str], w_bits: int = 4, a_bits: int = 4, switch: bool = False) -> Table:
    """The float weights and VVTQ's quantizers in float64; weights have a step, activations have none yet."""
    weights, activations = owners(table, others)
    table = dict(table)
    for q in weights + activations:
        bits = (w_bits if q in weights else a_bits) if "blocks." in q else 8
        table[f"{q}.nbits"] = torch.tensor([float(bits)], dtype=torch.float64)
        table[f"{q}.alpha"] = torch.full((7,), 9.0, dtype=torch.float64)  # a wrong slot shows
        table[f"{q}.init_state"] = torch.tensor([float(q in weights)], dtype=torch.float64)
        if q in weights:
            table[f"{q}.alpha"][bits - 2] = 2 * table[f"{q}.weight"].abs().mean() / sqrt(2 ** (bits - 1) - 1)
        elif q.endswith(".mlp.quant2") or (switch and ("blocks." in q or q == "quant") and "attn.quant_attn" not in q):
            table[f"{q}.beta"] = torch.zeros(7, dtype=torch.float64)
    return table


def with_offsets(table: Table, offset: float) -> Table:
    """Set every offset that is in use, and the unused ones to a value far away."""
    out = dict(table)
    for name in table:
        if name.endswith(".beta"):
            out[name] = torch.full_like(table[name], 5.0)
            out[name][int(table[name.replace("beta", "nbits")]) - 2] = offset
    return out


def numbered(table: Table) -> Table:
    """Give every quantizer a different step and offset in the slot that it uses, float32."""
    out = float32(table)
    for n, name in enumerate(name for name in table if name.endswith(".nbits")):
        q, slot = name.removesuffix(".nbits"), int(table[name]) - 2
        out[f"{q}.alpha"][slot] = 0.01 + n
        out[f"{q}.init_state"].fill_(1)
        if f"{q}.beta" in out:
            out[f"{q}.beta"][slot] = -n
    return out


def count(table: Table, end: str) -> int:
    return sum(name.endswith(f".{end}") for name in table)


def model_of(table: Table, **options: object) -> nn.Module:
    """Convert a quantized table and load it strictly."""
    converted = convert(table, **options)
    assert converted.card is not None
    model = converted.card.build()
    model.load_state_dict(converted.state, strict=True)
    return model.eval()


def spoilt(table: Table, spoil: Callable[[Table], object]) -> Table:
    """A copy of a table, changed by ``spoil``, which may write to small tensors only."""
    out = {name: value.clone() if value.numel() < 8 else value for name, value in table.items()}
    spoil(out)
    return out


def refusal(table: Table, **options: object) -> str:
    """The message, one line, with which the conversion stops."""
    with pytest.raises(QatError) as raised:
        convert(table, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


class Found:
    """Compares the quantizers of a converted model with a table that is `numbered`; ``left`` are those still to do."""

    def __init__(self, table: Table, w_bits: int, a_bits: int, switch: bool) -> None:
        model = model_of(table)
        raise_for_uncalibrated(model)
        self.table, self.left = table, dict(quantizers(model))
        self.w_bits, self.a_bits, self.switch = w_bits, a_bits, switch

    def site(self, name: str, *qs: str, bits: int = 0, signed: bool = True, offset: bool | None = None) -> None:
        weight = name.endswith("weight_quant")
        bits = bits or (self.w_bits if weight else self.a_bits)
        offset = (self.switch and not weight) if offset is None else offset
        quantizer = self.left.pop(name)
        assert quantizer.step.tolist() == [self.table[f"{q}.alpha"][bits - 2].item() for q in qs]
        assert (quantizer.spec.bits, quantizer.spec.signed, quantizer.spec.offset) == (bits, signed, offset)
        assert not offset or quantizer.offset.tolist() == [self.table[f"{qs[0]}.beta"][bits - 2].item()]

    def attention(self, ours: str, theirs: str) -> None:
        self.site(f"{ours}.qkv.input_quant", f"{theirs}.quant_input")
        self.site(f"{ours}.qkv.weight_quant", *(f"{theirs}.proj_{x}" for x in "qkv"))
        for x in "qkv":
            self.site(f"{ours}.{x}_quant", f"{theirs}.quant_{x}")
        self.site(f"{ours}.probs_quant", f"{theirs}.quant_attn", signed=False, offset=False)
        self.site(f"{ours}.proj.input_quant", f"{theirs}.quant_output")
        self.site(f"{ours}.proj.weight_quant", f"{theirs}.proj")

    def mlp(self, ours: str, theirs: str) -> None:
        self.site(f"{ours}.fc1.input_quant", f"{theirs}.quant1")
        self.site(f"{ours}.fc1.weight_quant", f"{theirs}.fc1")
        self.site(f"{ours}.fc2.input_quant", f"{theirs}.quant2", signed=False, offset=True)
        self.site(f"{ours}.fc2.weight_quant", f"{theirs}.fc2")


class Official:
    """Layers of VVTQ's forward pass by its formulas, in any dtype; a float table has no quantizers."""

    eps = 1e-6

    def __init__(self, table: Table) -> None:
        self.table = table

    def quant(self, q: str, x: Tensor) -> Tensor:
        """step * round(clip((x - beta) / step)) + beta; an activation that has no step yet takes it from ``x``."""
        table = self.table
        if f"{q}.nbits" not in table:
            return x
        bits = int(table[f"{q}.nbits"].clamp(2, 8).round())
        if not table[f"{q}.init_state"]:
            table[f"{q}.alpha"].fill_(2 * x.abs().mean() / sqrt(2 ** (bits - 1) - 1))  # all slots, as in VVTQ
            table[f"{q}.init_state"].fill_(1)
        low, high = (0, 2**bits - 1) if q.endswith(UNSIGNED) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        step, beta = table[f"{q}.alpha"][bits - 2], table[f"{q}.beta"][bits - 2] if f"{q}.beta" in table else 0.0
        return step * ((x - beta) / step).clamp(low, high).round() + beta

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.quant(name, self.table[f"{name}.weight"]), self.table.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, self.quant(name, self.table[f"{name}.weight"]), self.table[f"{name}.bias"], **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.table[f"{name}.weight"], self.table[f"{name}.bias"], self.eps)

    def attention(self, at: str, x: Tensor, width: int, bias: Tensor | float = 0.0) -> Tensor:
        """Attention of (B, N, C) with heads of ``width`` channels each; the shape stays."""
        x = self.quant(f"{at}.quant_input", x)
        parts = [self.linear(f"{at}.proj_{p}", x).unflatten(-1, (-1, width)).transpose(1, 2) for p in "qkv"]
        q, k, v = (self.quant(f"{at}.quant_{p}", part) for p, part in zip("qkv", parts, strict=True))  # (B, H, N, D)
        probs = self.quant(f"{at}.quant_attn", (q @ k.mT / sqrt(width) + bias).softmax(-1))
        return self.linear(f"{at}.proj", self.quant(f"{at}.quant_output", probs @ v).transpose(1, 2).flatten(2))

    def mlp(self, at: str, x: Tensor) -> Tensor:
        hidden = F.gelu(self.linear(f"{at}.fc1", self.quant(f"{at}.quant1", x)))
        return self.linear(f"{at}.fc2", self.quant(f"{at}.quant2", hidden))

    def head(self, x: Tensor) -> Tensor:
        return self.linear("head", self.quant("quant", x))
