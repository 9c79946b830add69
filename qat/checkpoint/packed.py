"""Packed checkpoints: a .safetensors file with the weights as codes of their own width, and the card in its header.

A quantized weight ``blocks.0.attn.qkv.weight`` is the tensor ``blocks.0.attn.qkv.weight_codes``, uint8, whose bits are
the codes less the smallest one (`qat.checkpoint.bits`). Every other tensor has its own name: steps, zero points,
offsets and tables as they are, the rest in float32 or float16. The header has the entry ``qat``, JSON: the card, what
is known of the calibration, and

    packed    for each packed weight its bits, its smallest code (qmin) and its shape
    rest      float32 or float16
    sha256    of all that stands before it in the JSON, and of every tensor's name, dtype, shape and bytes

A file of which a value has changed is refused. Weights are read as the values of their codes: to quantize them again
changes nothing, so logits are those of the checkpoint, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qat.checkpoint.bits import pack, stream_size, unpack
from qat.checkpoint.card import DAMAGED, Card
from qat.checkpoint.content import KEY, PREFIX, VERSION, outline
from qat.errors import QatError
from qat.quantizers import Quantizer
from qat.runs.writing import replacing
from qat.sites.insert import WeightSite, quantizers, weights

SUFFIX = ".safetensors"
CODES = "_codes"  # follows the name of a weight
MOST_TEXT = 2**23  # characters of a card, of 22,000 classes or so; more would take gigabytes to look into
KINDS = (torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
Rest = Literal["float32", "float16"]


def write_packed(path: Path, model: nn.Module, card: Card, content: Mapping[str, Any], rest: Rest = "float32") -> int:
    """Write a packed checkpoint.

    Args:
        path: of the new file.
        model: quantized and calibrated, on the CPU.
        card: of the model.
        content: of the checkpoint that it is from, for what is known of its calibration.
        rest: how tensors are stored that are neither codes nor parameters of quantizers.

    Returns:
        The size of the file in bytes.

    Raises:
        QatError: a weight is not the same again once its codes are read, or the file cannot be written.
    """
    tensors, packed = packed_state(model, rest)
    calibration = {key: value for key, value in content[KEY].get("calibration", {}).items() if key != "snr_db"}
    described = card.to_dict() | {"calibration": calibration, VERSION: content[VERSION]}
    header = described | {"packed": packed, "rest": rest}
    header["sha256"] = digest(header, tensors)
    data = save(tensors, {"format": "pt", KEY: as_json(header)})
    with replacing(path, "wb") as file:
        file.write(data)
    return len(data)


@torch.no_grad()
def packed_state(model: nn.Module, rest: Rest = "float32") -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of a model with packed weights, and for each of these its bits, its smallest code and its shape."""
    state, packed = dict(model.state_dict()), dict[str, dict[str, Any]]()
    for site in weights(model):
        name, spec = _parameter(site), site.quantizer.spec
        codes = _codes(site)
        bits = code_bits(site.quantizer)
        state[name + CODES] = pack(codes - spec.qmin, bits)
        packed[name] = {"bits": bits, "qmin": spec.qmin, "shape": list(site.weight.shape)}
        del state[name]
    own = {f"{name}.{key}" for name, quantizer in quantizers(model) for key in quantizer.state_dict()}
    for name, value in state.items():
        if rest == "float16" and name not in own and fits_half(value):
            value = value.half()
        state[name] = value.detach().cpu().contiguous().clone()  # two names may share memory, which the format refuses
    return state, packed


def fits_half(value: Tensor) -> bool:
    """Whether float16 holds a float32 tensor: no value is too large, and none is off by 2**-10 of the largest."""
    if value.dtype != torch.float32 or not value.numel():
        return False
    half = value.half().float()
    return bool(half.isfinite().all()) and float((half - value).abs().max()) <= 2**-10 * float(value.abs().max())


def code_bits(quantizer: Quantizer) -> int:
    """The bits that hold every code of a quantizer; more than its width where it has more levels."""
    return (quantizer.spec.levels - 1).bit_length()


def _codes(site: WeightSite) -> Tensor:
    """The codes of a weight, int32; QatError where their values have other codes."""
    quantizer, weight = site.quantizer, site.weight.detach()
    codes = quantizer.encode(weight)
    values = quantizer.decode(codes)
    if not torch.equal(quantizer.encode(values), codes) or not torch.equal(quantizer(values), quantizer(weight)):
        raise QatError(
            f"the weight of {site.name!r} cannot be packed: the values of its codes have other codes under "
            f"{quantizer.spec}; quantize it with LSQ or Uniform"
        )
    return codes.int()


def _parameter(site: WeightSite) -> str:
    return site.name.removesuffix("_quant")


def as_json(header: Mapping[str, Any]) -> str:
    """A header as text, without spaces between its parts."""
    return json.dumps(header, separators=(",", ":"))


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256, in hexadecimal digits, of a header without its own, and of tensors."""
    found = sha256(as_json({key: value for key, value in header.items() if key != "sha256"}).encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def is_packed(path: Path) -> bool:
    """Whether a file is a .safetensors file with a card in its header; False for one that cannot be read."""
    if path.suffix.lower() != SUFFIX or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_packed(path: Path, trust: bool = False) -> dict[str, Any]:
    """What a checkpoint of the same model would hold.

    Args:
        path: a file that `write_packed` wrote.
        trust: quantizers that its card names by a dotted path may be imported.

    Raises:
        QatError: the file is cut off, or a part of it was changed, or it is of another model than its card says.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = (file.metadata() or {}).get(KEY)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise QatError(f"cannot read {path}: {error}; it is cut off, or no .safetensors file") from None
    if stored is None:
        raise QatError(
            f"{path} does not describe a quantized model, so `qat export` did not write it; float weights are given as "
            "--model.checkpoint FILE"
        )
    try:
        if len(stored) > MOST_TEXT:
            raise ValueError
        header = json.loads(stored)
        known, own = header["sha256"], digest(header, tensors)
    except (ValueError, KeyError, TypeError, RecursionError, NotImplementedError, RuntimeError):
        raise QatError(f"{path}: its card cannot be read: {DAMAGED}") from None
    if known != own:
        raise QatError(f"{path}: a part of it has changed since `qat export` wrote it: export again, or copy it again")
    if odd := [name for name, value in tensors.items() if value.dtype not in KINDS]:
        raise QatError(f"{path}: {odd[0]!r} is of {tensors[odd[0]].dtype}, which qat does not write: {DAMAGED}")
    card = Card.from_dict(header, str(path), trust)
    state = unpacked_state(outline(card, len(tensors)), header.get("packed"), tensors, str(path))
    described = {key: value for key, value in header.items() if key not in ("packed", "rest", "sha256", VERSION)}
    named = {PREFIX + name: value.float() if value.dtype == torch.float16 else value for name, value in state.items()}
    return {"state_dict": named, KEY: described, VERSION: header.get(VERSION)}


def unpacked_state(model: nn.Module, packed: Any, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a model, with the values of codes in place of the codes.

    Args:
        model: says which weights have codes; it may be on the device ``meta``.
        packed: bits, smallest code and shape of every packed weight.
        tensors: as they are stored.
        source: what the errors call the file.

    Raises:
        QatError: codes or steps are missing, or are not those of the model.
    """
    state = dict(tensors)
    for site in weights(model):
        name, spec, bits = _parameter(site), site.quantizer.spec, code_bits(site.quantizer)
        expected = {"bits": bits, "qmin": spec.qmin, "shape": list(site.weight.shape)}
        stream = state.pop(name + CODES, None)
        if not isinstance(packed, Mapping) or packed.get(name) != expected or stream is None:
            raise QatError(f"{source}: the codes of {name!r} are not {expected}, as its card has them: {DAMAGED}")
        if stream.dtype != torch.uint8 or stream.shape != (stream_size(site.weight.numel(), bits),):
            raise QatError(f"{source}: the codes of {name!r} have the shape {tuple(stream.shape)}: {DAMAGED}")
        quantizer = spec.build(site.quantizer.layout)
        own = {key: state.get(f"{site.name}.{key}") for key in quantizer.state_dict()}
        for key, value in quantizer.state_dict().items():
            if (stored := own[key]) is None or stored.shape != value.shape:
                raise QatError(f"{source}: {site.name}.{key} is missing, or has another shape: {DAMAGED}")
        quantizer.load_state_dict(own)
        codes = unpack(stream, bits, site.weight.numel()).view(site.weight.shape) + spec.qmin
        state[name] = quantizer.decode(codes).detach()
    return state
