"""A quantized model as an ONNX model: exported by torch, then made small and free of what tells about this machine.

torch writes the graph, because it knows every operator that timm uses; our sites, layers and attentions are given to it
as operators (`torch.onnx.ops.symbolic`), so that nothing has to be found again in a graph afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qat.checkpoint import Card
from qat.errors import QatError, first_line
from qat.export.graph.layers import as_graph
from qat.export.graph.rows import keys_of
from qat.export.graph.sites import FLOAT, SITE
from qat.preprocessing import Preprocessing

Opset = Literal[21, 25]
OPSET: Opset = 21  # the first with 4 bits; what every runtime of the last years reads
IR = 10
OPSET_2_BITS, IR_2_BITS = 25, 12  # the first with 2 bits
INPUT, OUTPUT = "images", "logits"
_exports = threading.Lock()
NEEDS = "onnx and onnxscript write ONNX files, and onnxruntime checks them: pip install 'qat[export]'"


Activations = Literal["container", "exact"]


class Built(NamedTuple):
    """An ONNX model.

    Args:
        proto: a ``ModelProto``.
        exact: those of its initializers that are computed from other constants, in float64.
    """

    proto: Any
    exact: Mapping[str, npt.NDArray[np.float64]]


class FromPixels(nn.Module):
    """A model that reads uint8 images (B, 3, S, S) and normalizes them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C)."""
        logits: Tensor = self.model((images.float() / 255 - self.mean) / self.std)
        return logits


def build(
    model: nn.Module, card: Card, pixels: bool = False, activations: Activations = "container",
    opset: Opset = OPSET,
) -> Built:  # fmt: skip
    """The ONNX model, a ``ModelProto``, and constants that were folded.

    Args:
        model: quantized, calibrated, in evaluation mode on the CPU; it stays as it is.
        card: of the model.
        pixels: the graph reads uint8 images and normalizes them, in place of normalized float32 images.
        activations: 4-bit codes in a ``container`` of 8 bits, or as they are (``exact``).
        opset: 21; with 25, weights of 2 bits are stored in 2 bits.

    Raises:
        QatError: a package is missing, a site has no ONNX form, or the batch came out with a fixed size.
    """
    need_packages()
    preprocessing = Preprocessing(**card.preprocessing)
    size = preprocessing.size
    example = torch.zeros(2, 3, size, size)
    with torch.no_grad(), keys_of(model) as keys:
        model(example)
    graph = as_graph(copy.deepcopy(model).eval(), keys)
    if pixels:
        graph, example = FromPixels(graph, preprocessing).eval(), example.to(torch.uint8)
    try:
        with torch.no_grad(), quiet():
            program: Any = torch.onnx.export(
                graph, (example,), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise QatError(f"torch cannot write {card.arch} as a graph of any batch: {first_line(error)}") from None
    proto = program.model_proto
    first = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if not first.dim_param:
        raise QatError(f"the batch of {card.arch} came out as {first.dim_value}: its graph would read no other one")
    clean(proto, card)
    spell_out(proto)
    pack_weights(proto, opset)
    if activations == "exact":
        use_four_bits(proto)
    exact = {f"{name}.{key}" if name else key: value.numpy() for name, module in graph.named_modules()
             for key, value in getattr(module, "exact", {}).items()}  # fmt: skip
    return Built(proto, exact)


def need_packages() -> None:
    """Raise QatError where a package of the extra is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise QatError(f"{name} is not installed: {NEEDS}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines of the exporter, which one thread after the other may use."""
    with _exports:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)


def clean(proto: Any, card: Card) -> None:
    """Leave names of sites and the card, and remove traces, which hold paths of this machine, and shapes."""
    from onnx import helper

    proto.ir_version = IR
    for node in proto.graph.node:
        kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key in (SITE, FLOAT)]
        del node.metadata_props[:]
        node.doc_string = ""
        for key, value in kept:
            entry = node.metadata_props.add()
            entry.key, entry.value = key, value
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    proto.producer_name, proto.producer_version, proto.doc_string = "qat", "", ""
    helper.set_model_props(proto, {"qat": json.dumps(card.to_dict(), separators=(",", ":"))})


def spell_out(proto: Any) -> None:
    """Write the weights of products of floats as (codes - zero) * scale.

    onnxruntime replaces DequantizeLinear and a product with floats by MatMulNBits, which rounds the floats to 8 bits.
    """
    from onnx import TensorProto, helper, numpy_helper

    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if not any(entry.key == FLOAT for entry in node.metadata_props):
            nodes.append(node)
            continue
        codes, scale, zero = node.input
        (out,) = node.output
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
        factors = [numpy_helper.to_array(values[name]).astype(np.float32) for name in (zero, scale)]
        names = [f"{out}_zero", f"{out}_scale"]
        for name, array in zip(names, factors, strict=True):
            shaped = array[:, None] if axis == 0 else array
            proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(shaped), name))
        nodes += [
            helper.make_node("Cast", [codes], [f"{out}_codes"], to=TensorProto.FLOAT),
            helper.make_node("Sub", [f"{out}_codes", names[0]], [f"{out}_shifted"]),
            helper.make_node("Mul", [f"{out}_shifted", names[1]], [out]),
        ]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    remove_unused(proto)


def remove_unused(proto: Any) -> None:
    """Remove initializers that no node reads."""
    used = {name for node in proto.graph.node for name in node.input}
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name not in used]:
        proto.graph.initializer.remove(tensor)


def pack_weights(proto: Any, opset: Opset) -> None:
    """Store the codes of weights that fit into 4 bits as INT4, or into 2 bits as INT2, and cast them to INT8 first.

    Runtimes fold that cast when they load the model. Without it, they take the weight for one that is kept in 4 bits,
    and compute its product in floating point. No operator of the graph changes its meaning from opset 21 to 25.
    """
    from onnx import TensorProto, helper, numpy_helper

    codes = {node.input[0] for node in proto.graph.node if node.op_type in ("DequantizeLinear", "Cast")}
    widths = [(4, TensorProto.INT4)]
    if opset == OPSET_2_BITS:
        if not hasattr(TensorProto, "INT2"):
            raise QatError("--opset 25 needs a newer version of onnx: pip install --upgrade onnx, or leave it out")
        proto.ir_version = IR_2_BITS
        for domain in proto.opset_import:
            domain.version = OPSET_2_BITS if domain.domain == "" else domain.version
        widths = [(2, TensorProto.INT2), *widths]
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.name not in codes or tensor.data_type != TensorProto.INT8:
            continue
        values = numpy_helper.to_array(tensor)
        half = max(-int(values.min()), int(values.max()) + 1)
        fitting = [(bits, kind) for bits, kind in widths if half <= 2 ** (bits - 1)]
        if not fitting:
            continue
        bits, kind = fitting[0]
        parts = np.pad((values.flatten() & (2**bits - 1)).astype(np.uint8), (0, -values.size % (8 // bits)))
        packed, plain = f"{tensor.name}_int{bits}", tensor.name
        casts.append(helper.make_node("Cast", [packed], [plain], to=TensorProto.INT8))
        tensor.name, tensor.data_type = packed, kind
        shifts = range(0, 8, bits)
        tensor.raw_data = np.bitwise_or.reduce([parts[i :: len(shifts)] << s for i, s in enumerate(shifts)]).tobytes()
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def use_four_bits(proto: Any) -> None:
    """Let QuantizeLinear give UINT4 where an activation has 16 codes: the operator clips them itself."""
    from onnx import TensorProto, helper, numpy_helper

    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    clips = {node.input[0]: node for node in proto.graph.node if node.op_type == "Clip"}
    readers = {node.input[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    for node in list(proto.graph.node):
        clip = clips.get(node.output[0]) if node.op_type == "QuantizeLinear" else None
        if clip is None:
            continue
        least, most, zero = (int(numpy_helper.to_array(values[name])) for name in (*clip.input[1:], node.input[2]))
        if most - least != 15:
            continue
        name = f"uint4_{zero - least}"  # one for all sites that share it
        if name not in values:
            values[name] = helper.make_tensor(name, TensorProto.UINT4, [], [zero - least])
            proto.graph.initializer.append(values[name])
        reader = readers[clip.output[0]]
        node.input[2] = reader.input[2] = name
        reader.input[0] = node.output[0]
        proto.graph.node.remove(clip)
    remove_unused(proto)
