"""The same ONNX model in float64, to compare functions where rounding plays no part.

A deep network amplifies the rounding of float32: two right implementations differ in most codes of the last blocks. In
float64 they agree, if they are right. `onnx.reference` computes each operator by NumPy.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch import Tensor

from qat.export.graph.build import INPUT, Built
from qat.export.graph.sites import SITE


def as_double(built: Built) -> Any:
    """A copy whose floats are float64; constants that are computed from others have the precision of float64."""
    from onnx import TensorProto, numpy_helper

    found = copy.deepcopy(built.proto)
    graph = found.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            exact = built.exact.get(tensor.name)
            if exact is not None and np.array_equal(exact.astype(np.float32), values):  # what is stored is what counts
                values = exact
            values = values.astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                array = numpy_helper.to_array(attribute.t).astype(np.float64)
                attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
    return found


def site_outputs(proto: Any) -> list[tuple[str, str, str]]:
    """For every visit of a site that is QuantizeLinear: its name, the output that has its codes, and its zero point."""
    clips = {node.input[0]: node.output[0] for node in proto.graph.node if node.op_type == "Clip"}
    found = []
    for node in proto.graph.node:
        name = next((entry.value for entry in node.metadata_props if entry.key == SITE), None)
        if node.op_type == "QuantizeLinear" and name is not None:
            codes = node.output[0]
            found.append((name, clips.get(codes, codes), node.input[2]))
    return found


def run_double(built: Built, images: Tensor) -> tuple[Any, list[tuple[str, Any]]]:
    """Logits, and the integers n of every visit of a site, in the order of the graph.

    Args:
        built: the ONNX model.
        images: what the model reads, uint8 or float32.
    """
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Gelu(OpRun):  # that of onnx.reference has an error function in float32
        op_domain = ""

        def _run(self, x: Any, approximate: str | None = None) -> Any:
            import torch

            return (torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate or "none").numpy(),)

    proto = built.proto
    double, sites = as_double(built), site_outputs(proto)
    zeros = {t.name: int(numpy_helper.to_array(t)) for t in proto.graph.initializer if t.name in {z for *_, z in sites}}
    for output in dict.fromkeys(output for _, output, _ in sites):
        double.graph.output.append(helper.make_empty_tensor_value_info(output))
    logits, *codes = ReferenceEvaluator(double, new_ops=[Gelu]).run(
        None, {INPUT: (images.double() if images.is_floating_point() else images).numpy()}
    )
    by_output = dict(zip(dict.fromkeys(output for _, output, _ in sites), codes, strict=True))
    return logits, [(name, by_output[output].astype(np.int64) - zeros[zero]) for name, output, zero in sites]
