"""Rotates the heads of an attention by a Hadamard matrix: outliers of single channels spread over the head.

With R orthonormal (D, D), q . k = Rq . Rk, and W_o v = (W_o R^T)(R v). So the rows of W_q, W_k and W_v of each head,
and their biases, are multiplied by R, and the columns of W_o by R^T. The float model stays the same, and running it
costs no more. Shapes: H heads, D head width, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import QatError

PALEY = (11, 19)  # primes that are 3 modulo 4: they give the orders 12 and 20


def has_hadamard(size: int) -> bool:
    """Whether `hadamard` knows a matrix of this size."""
    return _core(size) is not None


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """An orthonormal matrix (size, size) whose entries have one absolute value, float64.

    It is the Kronecker product of matrices of order 2 (Sylvester) and at most one of order 12 or 20 (Paley).

    Raises:
        QatError: the size is not 2^k, 12 * 2^k or 20 * 2^k.
    """
    core = _core(size)
    if core is None:
        raise QatError(f"there is no rotation of width {size} here: only of 2^k, 12 * 2^k and 20 * 2^k")
    matrix: Tensor = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core - 1)
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    matrix = matrix * size**-0.5
    return matrix.to(device)


def _core(size: int) -> int | None:
    """The order that doubling starts from; None where no order leads to ``size``."""
    for order in (1, *(prime + 1 for prime in PALEY)):
        doubled = size // order
        if size > 0 and size % order == 0 and doubled & (doubled - 1) == 0:
            return order
    return None


def _paley(prime: int) -> Tensor:
    """Paley's first construction (1933), order prime + 1: 1 + [[0, 1], [-1, Q]], Q_ij the Legendre symbol of i - j."""
    squares = {i * i % prime for i in range(1, prime)}
    symbols = torch.tensor([0, *(1 if i in squares else -1 for i in range(1, prime))], dtype=torch.float64)
    places = torch.arange(prime)
    matrix = torch.eye(prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += symbols[(places[:, None] - places) % prime]
    return matrix


def rotatable(attn: nn.Module) -> tuple[bool, bool]:
    """What of an attention may be rotated: q with k, and v with the projection of the output.

    A norm between the projection and the product is not the same after a rotation; nor are rotary positions, so only
    attention with a ``fused_projection`` (`QuantHeads` in `qat.models.attention`), which has none, is rotated.
    """
    if not getattr(attn, "fused_projection", False):
        return False, False
    return _absent(attn, "q_norm") and _absent(attn, "k_norm"), _absent(attn, "norm")


def _absent(attn: nn.Module, name: str) -> bool:
    return isinstance(getattr(attn, name, nn.Identity()), nn.Identity)


@torch.no_grad()
def rotate_heads(model: nn.Module, name: str) -> None:
    """Rotate what is `rotatable` in one attention, in float64; before its weights and activations are calibrated.

    Raises:
        QatError: nothing of this attention is rotatable, or there is no rotation of the width of its heads.
    """
    attn: Any = model.get_submodule(name)
    scores, values = rotatable(attn)
    if not (scores or values):
        raise QatError(f"{name}: the heads of this {type(attn).__name__} cannot be rotated: leave it out")
    if not has_hadamard(attn.head_dim):
        raise QatError(
            f"{name}: heads of width {attn.head_dim} cannot be rotated: only those of 2^k, 12 * 2^k, 20 * 2^k"
        )
    R = hadamard(attn.head_dim, attn.qkv.weight.device)
    parts = [part for part, rotates in enumerate((scores, scores, values)) if rotates]
    for tensor in (attn.qkv.weight, attn.qkv.bias):  # (3 * H * D, C) and (3 * H * D,)
        heads = tensor.view(3, attn.num_heads, attn.head_dim, -1)  # shares memory
        heads[parts] = (R @ heads[parts].double()).to(tensor.dtype)
    if values:
        columns = attn.proj.weight.view(-1, attn.num_heads, attn.head_dim)  # (C, H, D), shares memory
        columns.copy_(columns.double() @ R.T)
