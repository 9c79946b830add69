"""Compares an ONNX file with the model that it was made from: in float64 for the function, in onnxruntime for the rest.

In float64, every integer of every site has to be the same. In float32 the share that is the same is only told: rounding
in one block changes codes in the next, and no two programs agree at the end of a deep network, nor does torch with
itself in float64.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from qat.errors import QatError, first_line
from qat.export.graph.build import INPUT, Built
from qat.export.graph.double import run_double, site_outputs
from qat.export.graph.grid import Grid, container_of, grid_of
from qat.export.graph.ladder import Table
from qat.preprocessing import Preprocessing
from qat.quantizers import IntegerNormQuantizer, Quantizer
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, weights

WIDE = "_int32"  # follows the name of an output
ROUNDING = {"MatMulNBits", "DynamicQuantizeMatMul"}  # round an operand that has no site
BATCH = 4  # images at a time: the codes of all sites are held
Integers = dict[str, list[npt.NDArray[np.int64]]]  # of every visit of a site, by its name


def has_container(grid: Grid) -> bool:
    """Whether the site is QuantizeLinear in the graph."""
    return container_of(*grid.ends) is not None


@contextmanager
def integers_of(model: nn.Module) -> Iterator[Integers]:
    """The integers of every affine site that a forward inside the block reaches."""
    grids: dict[str, Grid] = {}
    norms: dict[str, IntegerNormQuantizer] = {}
    for name, quantizer in quantizers(model):
        if isinstance(quantizer, IntegerNormQuantizer):
            norms[name] = quantizer
        elif quantizer.layout.batched and (grid := grid_of(quantizer)) is not None and has_container(grid):
            grids[name] = grid
    found: Integers = {name: [] for name in (*grids, *norms)}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        if name in norms:
            codes = norms[name].encode(*args).long() - norms[name].zero_point.long()
        else:
            codes = grids[name].integers(args[0].detach())
        found[name].append(codes.numpy().astype(np.int64))

    with watching({name: model.get_submodule(name) for name in found}, before=note):
        yield found


@torch.no_grad()
def same_function(
    built: Built, model: nn.Module, images: Tensor, preprocessing: Preprocessing
) -> tuple[int, int, float]:
    """Compare in float64: how many integers differ, of how many, and logits, as a share of the largest.

    Args:
        built: the ONNX model.
        model: quantized, in evaluation mode.
        images: what the ONNX model reads (B, 3, S, S), normalized or uint8.
        preprocessing: how uint8 images are normalized.
    """
    double = copy.deepcopy(model)
    for site in weights(double):  # codes of float32 on both sides: in float64, ties fall otherwise
        site.weight.copy_(site.quantizer(site.weight))
    double = double.double()
    with integers_of(double) as ours:
        logits = double(images.double() if images.is_floating_point() else in_float64(images, preprocessing)).numpy()
    theirs_logits, theirs = run_double(built, images)
    different, count = compared(ours, theirs)
    return different, count, float(np.abs(logits - theirs_logits).max() / np.abs(logits).max())


def in_float64(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalized images, computed in float64 from the constants of float32, as a graph does."""
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (images.double() / 255 - mean) / std


def compared(ours: Integers, theirs: list[tuple[str, npt.NDArray[np.int64]]]) -> tuple[int, int]:
    """How many integers of all visits differ, and of how many.

    A visit that is not in the graph must have the integers of another: the exporter computes once what is the same.

    Raises:
        QatError: a site is met more often in the graph than in torch, or less often without such a reason.
    """
    left = {name: list(found) for name, found in ours.items()}
    met, different, count = list[npt.NDArray[np.int64]](), 0, 0
    for name, found in theirs:
        if not left.get(name):
            raise QatError(f"site {name!r} is met more often in the graph than in torch")
        mine = left[name].pop(0)
        met.append(mine)
        different, count = different + int((mine != found).sum()), count + found.size
    for name, rest in left.items():
        if not all(any(np.array_equal(mine, other) for other in met) for mine in rest):
            raise QatError(f"site {name!r} is not in the graph as often as in torch")
    return different, count


@torch.no_grad()
def in_runtime(file: Path, model: nn.Module, images: Tensor, normalized: Tensor) -> dict[str, Any]:
    """Run a file in onnxruntime, on the CPU.

    Args:
        file: the ONNX file.
        model: that it was made from.
        images: what the file reads.
        normalized: what the model reads.

    Returns:
        equal_codes: share of the integers of all sites; largest_logit_difference; same_class: share of the images that
        both give the same class; same_class_torch_float64: that of torch with itself in float64;
        products: how many products of each kind onnxruntime computes: MatMulIntegerToFloat and QLinearMatMul are of
        integers, MatMul, FusedMatMul and Gemm of floats.

    Raises:
        QatError: onnxruntime does not take the file.
    """
    sites, plain = with_codes(onnx.load(file))
    try:
        with_outputs, optimized = session_of(plain.SerializeToString(), False), session_of(str(file), True)
        kinds = optimized_kinds(file)
    except Exception as error:  # of the runtime, which has no common base for them
        raise QatError(f"onnxruntime does not take {file}: {first_line(error)}") from None
    if rounds := kinds.keys() & ROUNDING:
        raise QatError(
            f"onnxruntime puts {min(rounds)} into {file}, which rounds what the site does not: do not use it"
        )
    double, different, count = in_double(model), 0, 0
    logits: dict[str, list[Any]] = {"torch": [], "exact": [], "fast": []}
    for read, x in zip(images.split(BATCH), normalized.split(BATCH), strict=True):
        feed = {INPUT: read.numpy()}
        _, *codes = with_outputs.run(None, feed)
        with integers_of(model) as ours:
            logits["torch"].append(model(x).numpy())
        theirs = [(name, codes[place].astype(np.int64) - zero) for name, place, zero in sites]
        parts = compared(ours, theirs)
        different, count = different + parts[0], count + parts[1]
        logits["exact"].append(double(x.double()).numpy())
        logits["fast"].append(optimized.run(None, feed)[0])
    found = {name: np.concatenate(parts) for name, parts in logits.items()}
    classes = {name: values.argmax(1) for name, values in found.items()}
    return {
        "equal_codes": 1 - different / max(count, 1),
        "largest_logit_difference": float(np.abs(found["torch"] - found["fast"]).max()),
        "same_class": float((classes["torch"] == classes["fast"]).mean()),
        "same_class_torch_float64": float((classes["torch"] == classes["exact"]).mean()),
        "products": {kind: count for kind, count in sorted(kinds.items()) if "MatMul" in kind or kind.endswith("Gemm")},
    }


def optimized_kinds(file: Path) -> Counter[str]:
    """How many operators of each kind onnxruntime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def with_codes(proto: Any) -> tuple[list[tuple[str, int, int]], Any]:
    """A model with the codes of its sites among its outputs.

    Returns:
        For every visit of a site its name, which of the further outputs has its codes, and its zero point; the model.
    """
    sites = site_outputs(proto)
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    outputs = list(dict.fromkeys(output for _, output, _ in sites))
    for output in outputs:  # as integers that NumPy has
        proto.graph.node.append(onnx.helper.make_node("Cast", [output], [output + WIDE], to=onnx.TensorProto.INT32))
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(output + WIDE))
    zeros = {zero: int(onnx.numpy_helper.to_array(values[zero])) for _, _, zero in sites}
    return [(name, outputs.index(output), zeros[zero]) for name, output, zero in sites], proto


def is_row(quantizer: Quantizer) -> bool:
    """Whether codes depend on a whole row, and are integers in float64 too."""
    return quantizer.replaces_softmax or quantizer.reads_integers


def session_of(model: str | bytes, optimized: bool) -> Any:
    """A session of onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def in_double(model: nn.Module) -> nn.Module:
    """A copy that computes in float64, with codes and thresholds of float32: in float64, ties fall otherwise."""
    double = copy.deepcopy(model)
    for site in weights(double):
        site.weight.copy_(site.quantizer(site.weight))
    for name, quantizer in list(quantizers(double)):
        if quantizer.layout.batched and grid_of(quantizer) is None and not is_row(quantizer):
            parent, _, child = name.rpartition(".")
            setattr(double.get_submodule(parent), child, Table(name, quantizer))
    return double.double()
