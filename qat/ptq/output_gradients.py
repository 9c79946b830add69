"""Gradients of the loss of a whole model at the outputs of one unit, and of every product inside it.

The loss is KL(float || quantized), as in PTQ4ViT (arXiv 2111.12293), summed over images. There, the float model is
compared with itself, and its gradient is rounding noise. Here the unit is quantized and the units after it are not, so
that the gradient tells which outputs of this unit matter. Shapes: B images, O outputs of a layer, T places of a
convolution, H heads, n rows and m columns of a product of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import QatError
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.unit_work import UnitWork, Visits
from qat.sites.family import family_of
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, switched_off

SLICE = 8  # images of one backward
NOISE = 4 * torch.finfo(torch.float32).eps  # the probabilities of two equal models differ by less


class Gradients(NamedTuple):
    """What one batch gives.

    Args:
        products: at the outputs of products, by the name of their left operand, one tensor for each visit: of a linear
            layer (B, ..., O), of a convolution (B, T, O), of two activations (B, H, n, m).
        unit: at the output of the unit.
        logits: at the output of the model (B, classes).
    """

    products: Visits
    unit: Tensor
    logits: Tensor

    def check(self, here: UnitWork) -> None:
        """Raise QatError where a gradient is zero or rounding noise, so that no candidate would be the best."""
        peaks = {name: max(float(g.abs().max()) for g in visits) for name, visits in self.products.items()}
        dead = [f"the output of {name!r}" for name, peak in peaks.items() if not peak > 0]
        if not (peak := float(self.logits.abs().max())) > NOISE:
            dead = [f"the logits, with {here.unit.name!r} quantized,"]
        if dead:
            raise QatError(
                f"the gradient at {dead[0]} is zero or rounding noise (at the logits at most {peak:.0e}), so that no "
                "step is better than another: use fewer bits, more images, or another method of calibration"
            )


def after(here: UnitWork, x: Tensor) -> Tensor:
    """What the units after this one, in floating point, make of its output (B, ...): logits (B, classes)."""
    units = family_of(here.model).units(here.model)
    later = units[[unit.name for unit in units].index(here.unit.name) + 1 :]
    inside = tuple(f"{name}." for unit in later for name in unit.modules)
    with switched_off(quantizer for name, quantizer in quantizers(here.model) if f"{name}.".startswith(inside)):
        for unit in later:
            x = unit.run(x)
    return x


def output_gradients(here: UnitWork, x: Tensor, target: Tensor) -> Gradients:
    """Gradients for one batch, in slices of images.

    Args:
        here: the unit, with its quantizers switched on.
        x: its input (B, ...).
        target: logits of the float model (B, classes).

    Raises:
        QatError: the output of a product cannot be seen, or a gradient is zero or rounding noise.
    """
    parts = [_sliced(here, *part) for part in zip(x.split(SLICE), target.split(SLICE), strict=True)]
    visits = {
        name: [torch.cat(same) for same in zip(*(part.products[name] for part in parts), strict=True)]
        for name in parts[0].products
    }
    found = Gradients(visits, *(torch.cat(same) for same in zip(*(part[1:] for part in parts), strict=True)))
    found.check(here)
    return found


def _sliced(here: UnitWork, x: Tensor, target: Tensor) -> Gradients:
    seen: Visits = {product.left: [] for product in here.products}
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        with _watching_outputs(here, seen):
            out = here.unit.run(x.detach().clone().requires_grad_())
        found = after(here, out)
        loss = F.kl_div(found.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
    for name in [name for name, visits in seen.items() if not visits]:
        raise QatError(
            f"the output of the product of {name!r} cannot be seen inside fused attention: quantize the probabilities "
            "too, *.attn.probs_quant"
        )
    tensors = [tensor for visits in seen.values() for tensor in visits]
    logits, unit, *rest = torch.autograd.grad(loss, [found, out, *tensors], materialize_grads=True)
    gradients = iter(rest)
    products = {
        product.left: [_rows(product, next(gradients)) for _ in seen[product.left]] for product in here.products
    }
    return Gradients(products, unit, logits)


def _rows(product: MatrixProduct, g: Tensor) -> Tensor:
    """Places before channels, as a layer sees them: a convolution gives (B, O, h, w)."""
    weight = product.matrices.weight
    return g if weight is None or weight.ndim == 2 else g.flatten(2).mT


def _traced(out: Tensor) -> Tensor:
    """The output; one that depends neither on images nor on anything that is trained gets a gradient too."""
    return out if out.requires_grad else out.requires_grad_()


@contextmanager
def _watching_outputs(here: UnitWork, seen: Visits) -> Iterator[None]:
    """Add the output of every product of a unit to ``seen`` while it runs."""
    layers = {
        f"{product.right.rpartition('.')[0]}.output_quant": seen[product.left]
        for product in here.products
        if product.matrices.weight is not None
    }
    sites = {name: here.model.get_submodule(name) for name in layers}
    with ExitStack() as stack:
        stack.enter_context(watching(sites, before=lambda name, args: layers[name].append(_traced(args[0]))))
        for product in here.products:
            if product.matrices.weight is None:
                stack.enter_context(_watching_attention(here, product, seen[product.left]))
        yield


@contextmanager
def _watching_attention(here: UnitWork, product: MatrixProduct, outputs: list[Tensor]) -> Iterator[None]:
    """The same for a product of two activations, which is a method of its attention and no module with hooks."""
    place, _, site = product.left.rpartition(".")
    attention: Any = here.model.get_submodule(place)
    name = "_scores" if site == "q_quant" else "_mix"
    method = getattr(attention, name)

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = method(left, right)
        outputs.append(_traced(out))
        return out

    setattr(attention, name, multiply)
    try:
        yield
    finally:
        delattr(attention, name)
