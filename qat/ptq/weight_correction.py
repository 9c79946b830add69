"""Steps that change weights and biases to make up for errors of quantization, without gradients.

All of them work from the moments of a layer's input (`LayerWork`), with every unit and product before it quantized and
corrected. Shapes: I inputs and O outputs of a layer, K candidates, G groups that share a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq.affine_fit import OutputMoments, affine_fit, bias_fit
from qat.ptq.fpcs import LEVELS, best_parameters, space_of
from qat.ptq.gptq import Grid, gptq
from qat.ptq.layer_work import LayerWork
from qat.ptq.matrix_products import MatrixProduct
from qat.ptq.product_search import blocks_of, by_group, tried_values
from qat.ptq.ridge import ridge, ridge_of_halves
from qat.ptq.search import BLOCK, OTHER_BLOCK
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.ptq.work import Work
from qat.quantizers import Quantizer
from qat.quantizers.space import Table
from qat.ranges import Range, check_fields
from qat.sites.insert import weights

Damping = Annotated[float, Range(above=0, high=10)]


@dataclass
class Ridge(Step):
    """The first step of ERQ (ICML 2024): weight and bias that make up for the quantizer of the layer's input.

    The target is the float product of the same input before it is quantized. The range of the weight is then chosen
    again, by the error of the output.

    Args:
        damping: of the ridge regression, as a share of the mean squared norm of an input; null chooses, for each
            layer, the one with which either half of the images serves the other half best.
    """

    damping: Damping | None = None

    stage = Stage.WEIGHTS
    changes_weights = True

    def __post_init__(self) -> None:
        check_fields(self)

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        """Correct the layer of a product, if its weight is to be calibrated."""
        layer = here.layer(product)
        if layer is None or not isinstance(layer.site, Quantizer):
            return
        with named(layer):
            weight = layer.weight
            if self.damping is None:
                change, bias = ridge_of_halves(layer.halves, weight)
            else:
                change, bias = ridge(layer.moments, weight, self.damping)
        layer.set_weight_(weight + change)
        layer.add_bias_(bias)
        fit_weight(layer)


@dataclass
class GPTQ(Step):
    """Rounding of weights column by column, each making up for the errors before it: GPTQ, and GPTAQ (ICML 2025).

    Args:
        damping: what is added to the diagonal of the moments, as a share of its mean.
        alpha: share of the difference to the input of the float model that is made up for too: GPTAQ has 0.25; 0 is
            GPTQ.
    """

    damping: Damping = 0.3
    alpha: Annotated[float, Range(low=0, high=1)] = 0.0

    stage = Stage.WEIGHTS
    changes_weights = True

    def __post_init__(self) -> None:
        check_fields(self)
        self.needs_float = self.alpha > 0

    def begin(self, work: Work) -> None:
        """Refuse a weight whose values are not evenly spaced."""
        for name, _, quantizer in weights(work.model):
            if name in work.wanted and quantizer.affine() is None:
                raise QatError(
                    f"GPTQ rounds to evenly spaced values, and {name!r} has {quantizer.spec}: choose Uniform or LSQ "
                    "there, or leave GPTQ out"
                )

    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        """Round the weight of a product."""
        layer = here.layer(product)
        affine = None if layer is None else layer.quantizer.affine()
        if layer is None or affine is None:
            return
        weight, cross = layer.weight, layer.float_moments.inputs_cross if self.alpha else None
        with named(layer):
            grid, gram = Grid.of(affine, weight), layer.moments.inputs_gram
            layer.set_weight_(gptq(weight, grid, gram, self.damping, cross, self.alpha))


@dataclass
class BiasCorrection(Step):
    """The mean error of every output goes into the bias, against the output in the float model.

    Args:
        affine: a factor for each output channel is fitted too; it goes into the steps of the weight, which has to be
            quantized by channel.
        damping: pulls the factor towards 1, as a share of the variance of the output.
    """

    affine: bool = False
    damping: Annotated[float, Range(low=0, high=100)] = 1.0

    stage = Stage.BIAS
    changes_weights = True
    needs_float = True

    def __post_init__(self) -> None:
        check_fields(self)

    def begin(self, work: Work) -> None:
        """Refuse, where factors are fitted, a weight that has no step for each channel."""
        for name, weight, quantizer in weights(work.model) if self.affine else ():
            if name in work.wanted and quantizer.layout.groups != len(weight) and _is_layer(name):
                raise QatError(
                    f"BiasCorrection: affine is true, but {name!r} has {quantizer.spec}: factors need "
                    "granularity channel; choose that, or leave affine out"
                )

    @torch.no_grad()
    def product(self, here: UnitWork, product: MatrixProduct) -> None:
        """Correct the bias of a product's layer."""
        layer = here.layer(product)
        if layer is None or layer.layer.bias is None:
            return
        matrix, (weight, bias) = product.matrices.right, here.originals.of(product)
        rounded = matrix(layer.quantizer(layer.layer.weight.float()))
        now = layer.layer.bias.detach()
        assert bias is not None
        with named(layer):
            found = OutputMoments.of_layer(layer.float_moments, (rounded, now), (matrix(weight), bias))
            factor, constant = affine_fit(found, self.damping) if self.affine else (None, bias_fit(found))
        if factor is not None:
            layer.set_weight_(layer.weight * factor[:, None])
            layer.quantizer.set_({"step": layer.quantizer.step.detach() * factor})
            constant = constant + (factor - 1) * now
        layer.add_bias_(constant)


def _is_layer(name: str) -> bool:
    """Whether the site is that of the weight of a layer; tables have other names."""
    return name.rpartition(".")[2] == "weight_quant"


@contextmanager
def named(layer: LayerWork) -> Iterator[None]:
    """Add the name of a layer to an error inside the block."""
    try:
        yield
    except QatError as error:
        raise QatError(f"layer {layer.name!r}: {error}") from None


@torch.no_grad()
def fit_weight(layer: LayerWork, levels: int = LEVELS) -> None:
    """Choose the range of a weight by the error of the layer's output, from the moments of its input."""
    quantizer, weight, gram = layer.quantizer, layer.layer.weight.detach().float(), layer.moments.inputs_gram.float()
    space = space_of(quantizer, quantizer.grouped(weight))
    if space is None:
        quantizer.init_from(quantizer.grouped(weight))
        return
    matrix, axis = layer.product.matrices.right, layer.product.matrices.axes[1]

    def errors_of(table: Table) -> Tensor:
        D = matrix(tried_values(quantizer, weight, table)) - matrix(weight)  # (K, O, I)
        return by_group(((D @ gram) * D).sum(-1), quantizer.layout, axis)

    def errors(table: Table) -> Tensor:
        together = max(1, BLOCK.get(weight.device.type, OTHER_BLOCK) // weight.numel())
        return torch.cat([errors_of(part) for part in blocks_of(table, together)])

    quantizer.set_(best_parameters(space, errors, levels=levels).row)
