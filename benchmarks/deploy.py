"""How long an exported model takes, over the float model in the fastest runtime: onnxruntime and OpenVINO, on the CPU.

    python benchmarks/deploy.py --ckpt ptq.ckpt ... --checkpoint FLOAT.safetensors
        --data DIR --images 200 --batch 1 16 --threads 1                       -> minutes

Every checkpoint is exported to ONNX as `qat export` does, in a temporary folder. In each turn every model is run once,
in every runtime, one after the other: the ratios are of medians over the turns. The float model is that of the first
checkpoint. bfloat16 is OpenVINO's own precision on processors that have it, the honest competitor of 8 bits. Operators
are those of onnxruntime after its fusions: MatMulIntegerToFloat, QLinearMatMul and ConvInteger multiply integers.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qat import build_float, checkpoint
from qat.checkpoint import Card
from qat.data.check import cores
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.export.graph.build import INPUT, OPSET, OUTPUT, build, quiet
from qat.export.graph.check import optimized_kinds
from qat.preprocessing import Preprocessing

Floats = npt.NDArray[np.float32]
Run = Callable[[Floats], Floats]
INTEGER = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "ConvInteger", "MatMulInteger")
PRODUCTS = (*INTEGER, "MatMul", "FusedMatMul", "Gemm", "Conv", "MatMulNBits")


class Model(NamedTuple):
    """A file, in one runtime.

    Args:
        name: of the model.
        runtime: name of the runtime, and of its precision where that is not float32.
        file: ONNX.
        run: from images (B, 3, S, S) to logits.
    """

    name: str
    runtime: str
    file: Path
    run: Run


def in_onnxruntime(file: Path, threads: int) -> Run:
    """A session with all optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {INPUT: x})[0]


def in_openvino(file: Path, threads: int, precision: str) -> Run:
    """A compiled model; ``precision`` is f32 or bf16."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda x: np.array(request.infer({INPUT: x})[0])


def write_float(model: nn.Module, size: int, file: Path) -> None:
    """The float model as ONNX."""
    with torch.no_grad(), quiet():
        program: Any = torch.onnx.export(
            model, (torch.zeros(2, 3, size, size),), dynamo=True, opset_version=OPSET, input_names=[INPUT],
            output_names=[OUTPUT], dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
    program.save(str(file))


def validation(root: Path, count: int, card: Card) -> tuple[Tensor, Tensor]:
    """Normalized images (count, 3, S, S), spread over all validation images, and their classes."""
    options = DataOptions(root, val_batch_size=50, preprocessing=card.preprocessing, workers=min(2, cores()))
    data = ImageNetDataModule(options)
    data.setup("validate")
    batches = list(data.val_dataloader())
    images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])
    picks = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    return Preprocessing(**card.preprocessing).normalize(images[picks]), labels[picks]


def models(args: argparse.Namespace, folder: Path) -> tuple[list[Model], list[Card]]:
    """Every file in every runtime."""
    cards, files = [], []
    for i, path in enumerate(args.ckpt):
        card, _ = checkpoint.read(path)
        if not i:
            float_model = build_float(card.arch, args.checkpoint, card.num_classes, card.model_args).eval()
            write_float(float_model, card.preprocessing["size"], folder / "float.onnx")
            files.append(("float", folder / "float.onnx"))
        file = folder / f"{i}.onnx"
        file.write_bytes(build(checkpoint.load(path), card).proto.SerializeToString())
        files.append((args.names[i] if args.names else path.parent.parent.name or path.name, file))
        cards.append(card)
    found = []
    for name, file in files:
        found.append(Model(name, "onnxruntime", file, in_onnxruntime(file, args.threads)))
        found.append(Model(name, "OpenVINO", file, in_openvino(file, args.threads, "f32")))
        if name == "float":
            found.append(Model(name, "OpenVINO, bfloat16", file, in_openvino(file, args.threads, "bf16")))
    return found, cards


def measure(found: list[Model], batch: int, size: int, turns: int) -> list[float]:
    """Median seconds of every model."""
    x = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    seconds: list[list[float]] = [[] for _ in found]
    for turn in range(turns + 2):
        for model, own in zip(found, seconds, strict=True):
            started = time.perf_counter()
            model.run(x)
            if turn >= 2:
                own.append(time.perf_counter() - started)
    return [median(own) for own in seconds]


def operators(file: Path) -> str:
    """The products that onnxruntime computes, integer ones first."""
    kinds: Counter[str] = optimized_kinds(file)
    return ", ".join(f"{kinds[kind]} {kind}" for kind in PRODUCTS if kinds[kind])


def main() -> None:
    """Measure every model, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, nargs="+", required=True, help="checkpoints of one architecture")
    parser.add_argument("--names", nargs="+", help="what the table calls them")
    parser.add_argument("--checkpoint", help="float weights, a local file; random ones when left out")
    parser.add_argument("--data", type=Path, help="folder with val/, on whose images the accuracy is measured")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        found, cards = models(args, Path(folder))
        size = cards[0].preprocessing["size"]
        seconds = {batch: measure(found, batch, size, args.turns) for batch in args.batch}
        table = Table(
            "model", "runtime", *(f"batch {n}, ms" for n in args.batch), *(f"ratio, {n}" for n in args.batch), "MB"
        )
        floats = [i for i, model in enumerate(found) if model.name == "float" and "bfloat16" not in model.runtime]
        for i, model in enumerate(found):
            times = [f"{1000 * seconds[n][i]:.1f}" for n in args.batch]
            ratios = [f"{seconds[n][i] / min(seconds[n][k] for k in floats):.2f}" for n in args.batch]
            table.add_row(model.name, model.runtime, *times, *ratios, f"{model.file.stat().st_size / 1e6:.2f}")
        console = Console(width=140)
        console.print(f"onnxruntime {onnxruntime.__version__}, {args.threads} thread(s), {args.turns} turns; "
                      "ratio: over the faster of the float32 models")  # fmt: skip
        console.print(table)
        for model in found:
            if model.runtime == "onnxruntime":
                console.print(f"{model.name}: {operators(model.file)}")
        if args.data is not None:
            images, labels = validation(args.data, args.images, cards[0])
            parts = [part.numpy() for part in images.split(10)]
            for model in found:
                logits = torch.from_numpy(np.concatenate([model.run(part) for part in parts]))
                top1 = (logits.argmax(1) == labels).float().mean()
                console.print(f"{model.name}, {model.runtime}: top-1 {top1:.1%} on {len(labels)} images")


if __name__ == "__main__":
    main()
