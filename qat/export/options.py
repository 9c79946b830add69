"""What `qat export` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qat.checkpoint.packed import Rest
from qat.errors import QatError
from qat.ranges import check_fields

Format = Literal["safetensors", "folder", "onnx"]
OF_FORMATS = {  # options that only some formats have
    "rest": ("safetensors", "folder"),
    "pixels": ("onnx",),
    "activations": ("onnx",),
    "opset": ("onnx",),
    "results": ("folder",),
    "base_model": ("folder",),
}


@dataclass(frozen=True)
class ExportOptions:
    """A checkpoint to export.

    Args:
        ckpt: a checkpoint, the folder of a run, or the word last for the newest run.
        output: file or folder to write.
        format: safetensors: one file with packed weights, which qat reads; folder: that file with a config and a model
            card, ready to be uploaded to the Hugging Face hub; onnx: a graph with QuantizeLinear and DequantizeLinear.
        rest: how a packed file stores the tensors that are not quantized; with float16 they are rounded, and logits
            change.
        pixels: an ONNX graph reads uint8 images and normalizes them itself.
        activations: how an ONNX graph has activations of 4 bits: in a container of 8 bits, for which runtimes have
            integer kernels, or exact, as UINT4.
        opset: of an ONNX graph: 21, which runtimes have read for years; 25 stores weights of 2 bits in 2 bits, in place
            of 4, and needs a newer one, such as onnxruntime 1.32.
        images: folder of images on which the exported model is compared with the checkpoint; random ones when left out.
        force: overwrite the output.
        runs: folder of all runs, for ckpt last.
        base_model: name on the Hugging Face hub of the float model, for the model card; that of timm's weights when
            left out, where the architecture names them with a tag.
        results: JSON files that qat validate or qat calibrate has written (results_file); the model card quotes them.
        trust: quantizers that the checkpoint names by a dotted path may be imported, which runs their code.
    """

    ckpt: Path
    output: Path
    format: Format = "safetensors"
    rest: Rest = "float32"
    pixels: bool = False
    activations: Literal["container", "exact"] = "container"
    opset: Literal[21, 25] = 21
    images: Path | None = None
    force: bool = False
    runs: Path = Path("runs")
    base_model: str | None = None
    results: list[Path] = field(default_factory=list)
    trust: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name, formats in OF_FORMATS.items():
            if self.format not in formats and getattr(self, name) != self.__dataclass_fields__[name].default:
                if name == "results" and not self.results:
                    continue
                raise QatError(f"--{name} has no meaning for --format {self.format}: leave it out")
