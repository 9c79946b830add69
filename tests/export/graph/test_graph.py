"""ONNX models of every family and of recipes of every kind: the same function, and integers where they should be."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qat import build_float, build_recipe, calibrate, quantize
from qat.checkpoint import Card
from qat.errors import QatError
from qat.export.graph.build import Built, build
from qat.export.graph.check import in_runtime, same_function
from qat.export.graph.double import site_outputs
from qat.export.graph.layers import as_graph
from qat.models import default_preprocessing
from qat.preprocessing import Preprocessing
from tests.contracts.family_cases import MODELS

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")

FORMS = ["deit", "siglip", "grouped_queries", "beit", "swin_padded", "sret"]  # each kind of attention and of positions
RECIPES = [("lsq", 4), ("uniform", 3), ("frontier", 4), ("ptq4vit", 6), ("fq_vit_884", 8), ("deploy", 4)]
CASES = [(form, "vvtq", 4) for form in FORMS if form in MODELS] + [("deit", *recipe) for recipe in RECIPES]
CASES += [("swin", "fq_vit_884", 8)]


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@cache
def made(form: str, recipe: str, bits: int) -> tuple[nn.Module, Card]:
    arch, arguments = MODELS[form]
    torch.manual_seed(0)
    rules = build_recipe(recipe, w_bits=bits, a_bits=bits)
    model = quantize(build_float(arch, None, 10, arguments).eval(), rules)
    calibrate(model, [images(4)])
    plain = default_preprocessing(arch, arguments).to_dict() | {"size": 32}
    return model, Card(arch, {}, 10, [rule.to_dict() for rule in rules], plain, [])


@cache
def built(form: str, recipe: str, bits: int) -> Built:
    return build(*made(form, recipe, bits))


@pytest.mark.parametrize(("form", "recipe", "bits"), CASES)
def test_it_is_the_same_function_and_runs_with_any_batch(form, recipe, bits, tmp_path):
    model, card = made(form, recipe, bits)
    found = built(form, recipe, bits)
    proto, seen = found.proto, Preprocessing(**card.preprocessing)
    different, count, distance = same_function(found, model, images(3), seen)
    assert different == 0
    assert count > 0
    assert distance < 1e-12  # a rounding of float64, amplified by a network of two blocks
    onnx.checker.check_model(proto, full_check=True)
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    for batch in (1, 5):
        ran = in_runtime(tmp_path / "a.onnx", model, images(batch), images(batch))  # refuses MatMulNBits
        assert ran["equal_codes"] > 0.9  # rounding in float32 may change some, and more behind them


def sources(proto: object) -> list[tuple[str, str]]:
    """For every matrix product, the operators that its operands come from."""
    by_output = {output: node for node in proto.graph.node for output in node.output}
    kind = {name: node.op_type for name, node in by_output.items()}
    found = []
    for node in proto.graph.node:
        if node.op_type == "MatMul":
            operands = list(node.input)
            for i, name in enumerate(operands):  # k is transposed
                if kind.get(name) == "Transpose":
                    operands[i] = by_output[name].input[0]
            found.append(tuple(kind.get(name, "input") for name in operands))
    return found


@pytest.mark.parametrize("recipe", ["lsq", "vvtq"])
def test_every_product_of_learned_steps_reads_integers(recipe):
    products = sources(built("deit", recipe, 4).proto)
    assert len(products) == 2 * 6 + 1
    assert set(products) == {("DequantizeLinear", "DequantizeLinear")}


def test_weights_of_four_bits_take_four_bits_and_the_card_is_inside():
    model, _ = made("deit", "vvtq", 4)
    proto = built("deit", "vvtq", 4).proto
    four = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(four) == 2 * 4  # patches and head have 8 bits
    layer = model.blocks[0].mlp.fc1
    codes = layer.weight_quant.encode(layer.weight).mT.numpy()
    (stored,) = [t for t in four if t.name.startswith("blocks.0.mlp.fc1.")]
    assert np.array_equal(onnx.numpy_helper.to_array(stored).astype(np.int8), codes)
    assert len(stored.raw_data) == codes.size // 2
    (entry,) = proto.metadata_props
    assert entry.key == "qat"
    assert '"arch":"deit_tiny_patch16_224"' in entry.value
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    assert proto.ir_version == 10


def test_nothing_in_it_tells_of_the_machine_that_wrote_it():
    proto = built("deit", "vvtq", 4).proto
    data = proto.SerializeToString()
    for word in (os.getcwd(), str(Path(torch.__file__).parent), "Traceback", ".py"):
        assert word.encode() not in data


def test_sites_are_named():
    names = [name for name, _, _ in site_outputs(built("deit", "vvtq", 4).proto)]
    assert "blocks.1.attn.probs_quant" in names
    assert "blocks.0.mlp.fc2.input_quant" in names
    assert len(set(names)) == len(names)


def test_pixels_are_normalized_inside(tmp_path):
    model, card = made("deit", "lsq", 8)
    found = build(model, card, pixels=True)
    (tmp_path / "a.onnx").write_bytes(found.proto.SerializeToString())
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = Preprocessing(**card.preprocessing)
    assert same_function(found, model, pixels, seen)[0] == 0
    normalized = seen.normalize(pixels)
    assert in_runtime(tmp_path / "a.onnx", model, pixels, normalized)["equal_codes"] > 0.99


def test_a_site_without_a_form_is_refused_by_its_name():
    with pytest.raises(
        QatError, match=r"site .blocks.0.norm1.output_quant. has IntegerNorm.*choose arithmetic: integer"
    ):
        build(*made("deit", "fq_vit_884_released", 8))


def test_the_model_stays_as_it_was():
    model, card = made("deit", "vvtq", 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    build(model, card)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(not hasattr(onnx.TensorProto, "INT2"), reason="this version of onnx has no INT2")
def test_weights_of_two_bits_can_be_stored_in_two_bits(tmp_path):
    model, card = made("deit", "vvtq", 2)
    found, plain = build(model, card, opset=25), build(model, card)
    onnx.checker.check_model(found.proto, full_check=True)
    stored = [tensor for tensor in found.proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT2]
    assert len(stored) == 8, "four layers in each of two blocks; patches and head have 8 bits"
    assert all(len(tensor.raw_data) == -(-int(np.prod(tensor.dims)) // 4) for tensor in stored)
    assert same_function(found, model, images(2), Preprocessing(**card.preprocessing))[0] == 0
    (tmp_path / "a.onnx").write_bytes(found.proto.SerializeToString())
    assert in_runtime(tmp_path / "a.onnx", model, images(2), images(2))["same_class"] == 1
    assert found.proto.ByteSize() < plain.proto.ByteSize()


def test_activations_of_four_bits_can_be_what_they_are(tmp_path):
    model, card = made("deit", "vvtq", 4)
    exact = build(model, card, activations="exact")
    proto = exact.proto
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    zeros = [kinds[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros.count(onnx.TensorProto.UINT4) == len(zeros) - 2 == 16  # patches and head have 8 bits
    assert not [node for node in proto.graph.node if node.op_type == "Clip"]
    onnx.checker.check_model(proto, full_check=True)
    assert same_function(exact, model, images(3), Preprocessing(**card.preprocessing))[0] == 0
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    assert in_runtime(tmp_path / "a.onnx", model, images(2), images(2))["equal_codes"] > 0.9


def test_a_wrong_head_is_noticed_although_all_codes_are_right():
    model, card = made("deit", "lsq", 4)
    found = build(model, card)
    (bias,) = [tensor for tensor in found.proto.graph.initializer if tensor.name == "head.bias"]
    bias.raw_data = np.arange(10, dtype=np.float32).tobytes()
    different, _, distance = same_function(found, model, images(2), Preprocessing(**card.preprocessing))
    assert different == 0
    assert distance > 1


def test_layers_that_read_floats_are_not_rounded_by_the_runtime(tmp_path):
    arch, arguments = MODELS["deit"]
    torch.manual_seed(0)
    rules = build_recipe("vvtq", [{"match": "*.fc?.input_quant", "spec": None}], w_bits=4, a_bits=4)
    model = quantize(build_float(arch, None, 10, arguments).eval(), rules)
    calibrate(model, [images(4)])
    plain = default_preprocessing(arch, arguments).to_dict() | {"size": 32}
    card = Card(arch, {}, 10, [rule.to_dict() for rule in rules], plain, [])
    found = build(model, card)
    assert same_function(found, model, images(2), Preprocessing(**plain))[0] == 0
    (tmp_path / "a.onnx").write_bytes(found.proto.SerializeToString())
    products = in_runtime(tmp_path / "a.onnx", model, images(2), images(2))["products"]
    assert products["MatMulIntegerToFloat"] >= 2 * 2  # qkv and proj of each block
    assert products["MatMul"] + products.get("FusedMatMul", 0) >= 2 * 2  # both layers of each MLP
    four = [t for t in found.proto.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(four) == 2 * 4


def test_positions_may_have_no_table():
    arch, arguments = MODELS["beit"]
    rules = build_recipe("vvtq", w_bits=4, a_bits=4)
    model = quantize(build_float(arch, None, 10, {**arguments, "use_rel_pos_bias": False}).eval(), rules)
    calibrate(model, [images(4)])
    assert as_graph(model, {}) is model
