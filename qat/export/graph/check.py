"""Compares an ONNX file with the model that it was made from: in float64 for the function, in onnxruntime for the rest.

In float64, every integer of every site has to be the same. In float32 the share that is the same is only told: rounding
in one block changes codes in the next, and no two programs agree at the end of a deep network, nor does torch with
itself in float64.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.export.graph.build import INPUT, NEEDS, Built
from qat.export.graph.double import run_double, site_outputs
from qat.export.graph.grid import Grid, grid_of
from qat.preprocessing import Preprocessing
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, weights

WIDE = "_int32"  # follows the name of an output
Integers = dict[str, list[npt.NDArray[np.int64]]]  # of every visit of a site, by its name


@contextmanager
def integers_of(model: nn.Module) -> Iterator[Integers]:
    """The integers of every affine site that a forward inside the block reaches."""
    grids: dict[str, Grid] = {}
    for name, quantizer in quantizers(model):
        if quantizer.layout.batched and (grid := grid_of(quantizer)) is not None:
            grids[name] = grid
    found: Integers = {name: [] for name in grids}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        found[name].append(grids[name].integers(args[0].detach()).numpy().astype(np.int64))

    with watching({name: model.get_submodule(name) for name in grids}, before=note):
        yield found


@torch.no_grad()
def same_function(
    built: Built, model: nn.Module, images: Tensor, preprocessing: Preprocessing
) -> tuple[int, int, float]:
    """Compare in float64: how many integers differ, of how many, and the largest difference of logits.

    Args:
        built: the ONNX model.
        model: quantized, in evaluation mode.
        images: what the ONNX model reads (B, 3, S, S), normalized or uint8.
        preprocessing: how uint8 images are normalized.
    """
    double = copy.deepcopy(model)
    for site in weights(double):
        site.weight.copy_(
            site.quantizer(site.weight)
        )  # codes of float32 on both sides: in float64, ties fall otherwise
    double = double.double()
    with integers_of(double) as ours:
        logits = double(images.double() if images.is_floating_point() else in_float64(images, preprocessing)).numpy()
    theirs_logits, theirs = run_double(built, images)
    different, count = compared(ours, theirs)
    return different, count, float(np.abs(logits - theirs_logits).max())


def in_float64(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalized images, computed in float64 from the constants of float32, as a graph does."""
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (images.double() / 255 - mean) / std


def compared(ours: Integers, theirs: list[tuple[str, npt.NDArray[np.int64]]]) -> tuple[int, int]:
    """How many integers of all visits differ, and of how many."""
    visits, different, count = Counter[str](), 0, 0
    for name, found in theirs:
        wanted = ours[name][visits[name]]
        visits[name] += 1
        different, count = different + int((wanted != found).sum()), count + found.size
    return different, count


@torch.no_grad()
def in_runtime(file: Path, model: nn.Module, images: Tensor, normalized: Tensor) -> Mapping[str, Any]:
    """Run a file in onnxruntime, on the CPU.

    Args:
        file: the ONNX file.
        model: that it was made from.
        images: what the file reads.
        normalized: what the model reads.

    Returns:
        equal_codes: share of the integers of all sites; largest_logit_difference; same_class: share of the images that
        both give the same class; same_class_torch_float64: that of torch with itself in float64.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise QatError(f"{error.name} is not installed: {NEEDS}") from None
    proto = onnx.load(file)
    sites = site_outputs(proto)
    zeros = {
        t.name: int(onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer if t.name in {z for *_, z in sites}
    }
    outputs = list(dict.fromkeys(output for _, output, _ in sites))
    for output in outputs:  # as integers that NumPy has
        proto.graph.node.append(onnx.helper.make_node("Cast", [output], [output + WIDE], to=onnx.TensorProto.INT32))
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(output + WIDE))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feed = {INPUT: images.numpy()}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    _, *codes = session.run(None, feed)
    by_output = dict(zip(outputs, codes, strict=True))
    theirs = [(name, by_output[output].astype(np.int64) - zeros[zero]) for name, output, zero in sites]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, feed)
    with integers_of(model) as ours:
        wanted = model(normalized).numpy()
    different, count = compared(ours, theirs)
    exact = in_double(model)(normalized.double()).numpy()
    return {
        "equal_codes": 1 - different / max(count, 1),
        "largest_logit_difference": float(np.abs(wanted - logits).max()),
        "same_class": float((wanted.argmax(1) == logits.argmax(1)).mean()),
        "same_class_torch_float64": float((wanted.argmax(1) == exact.argmax(1)).mean()),
    }


@torch.no_grad()
def in_double(model: nn.Module) -> nn.Module:
    """A copy that computes in float64, with the codes that weights have in float32: in float64, ties fall otherwise."""
    double = copy.deepcopy(model)
    for site in weights(double):
        site.weight.copy_(site.quantizer(site.weight))
    return double.double()
