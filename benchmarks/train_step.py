"""Seconds and memory of a quantized training step, over those of the float step of plain timm.

    python benchmarks/train_step.py                -> CPU and, where there is one, GPU (float32 and bfloat16 autocast)
    python benchmarks/train_step.py --blocks       -> also with every block compiled as a whole: minutes on a CPU

A step is what `qat fit` does with a batch that is on the device: normalize uint8 crops, forward, cross-entropy with
labels, backward, AdamW, projection. The float step is the same with timm's own model and its fused attention. All
variants run in turn, in one process, on one batch; the median of their times is reported. The ratio is the figure of
merit: a time depends on the machine and its load, a ratio within one run far less.

Memory on a GPU is the peak that the allocator reports during one step, everything included. On a CPU it is what the
forward pass allocates and does not free, as the profiler counts it: what is kept for backward. That is what grows with
the batch and what quantization changes; weights, gradients and optimizer state are the same for both.

Shapes: B crops of S x S pixels, C classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from qat.data.images import Batch
from qat.ptq import InitSteps
from qat.quantizers.projection import Projection
from qat.runs.process import keep_freed_memory
from qat.sites.insert import quantizers
from qat.training.losses import cross_entropy
from qat.training.module import QATModule
from qat.training.options import ModelOptions
from qat.training.regularizers import BinRegularizer

WARM_UP = 2
Row = tuple[float, int, float]


@dataclass(frozen=True)
class Variant:
    """What is measured."""

    name: str
    quantized: bool = True
    compiled: bool = False  # the arithmetic of the quantizers, as with model.compile
    blocks: bool = False  # every block as a whole, by torch.compile
    regularized: bool = False


VARIANTS = (
    Variant("float", quantized=False),
    Variant("quantized"),
    Variant("quantized, regularizer", regularized=True),
    Variant("compiled", compiled=True),
    Variant("compiled, regularizer", compiled=True, regularized=True),
)
BLOCKS = (Variant("float, blocks", quantized=False, blocks=True), Variant("quantized, blocks", blocks=True))


@dataclass(frozen=True)
class Result:
    """One variant in one setting: median seconds, bytes of memory, and seconds of the first steps with compilation."""

    device: str
    dtype: str
    variant: str
    seconds: float
    bytes: int
    first_seconds: float


class Step:
    """One training step of a module on one synthetic batch.

    Args:
        module: float, or quantized and not yet calibrated.
        batch: crops on the device.
        dtype: of autocast; float32 leaves it off.
        variant: what is measured.
    """

    def __init__(self, module: QATModule, batch: Batch, dtype: torch.dtype, variant: Variant) -> None:
        self.module, self.batch, self.dtype = module.to(batch.images.device), batch, dtype
        InitSteps()(self.module.model.eval(), [module.preprocessing.normalize(batch.images)])
        self.module.train()
        for block in self.module.model.blocks if variant.blocks else ():
            block.compile()
        self.project = Projection(quantizer for _, quantizer in quantizers(self.module.model))
        self.regularizer = BinRegularizer() if variant.regularized else None
        self.sites = self.regularizer.choose(self.module.model) if self.regularizer else []
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-5)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.project()

    def loss(self) -> Tensor:
        """The forward pass."""
        with torch.autocast(self.batch.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = cross_entropy(self.module(self.batch.images), self.batch.labels)
            if self.regularizer is None:
                return loss
            return loss + self.regularizer.weight * self.regularizer.penalty(self.sites)

    def seconds(self) -> float:
        """Wall-clock time of one step, the work on the device included."""
        wait = torch.cuda.synchronize if self.batch.images.is_cuda else lambda: None
        wait()
        started = time.perf_counter()
        self()
        wait()
        return time.perf_counter() - started


def saved_bytes(step: Step) -> int:
    """Bytes that the forward pass allocates and does not free: what is kept for backward, and the loss."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = step.loss()
    loss.backward()
    step.optimizer.zero_grad()
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def peak_bytes(step: Step) -> int:
    """Peak of the GPU's allocator in one step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def measure(make: Callable[[Variant], Step], variants: Sequence[Variant], repeats: int, on_gpu: bool) -> list[Row]:
    """Seconds, bytes and first seconds of each variant. Memory is measured while a variant is alone, times in turn."""
    used, first = [], []
    for variant in variants:
        step = make(variant)
        started = time.perf_counter()
        for _ in range(WARM_UP):
            step.seconds()
        first.append(time.perf_counter() - started)
        used.append(peak_bytes(step) if on_gpu else saved_bytes(step))
        del step
    steps = [make(variant) for variant in variants]
    for _ in range(WARM_UP):
        for step in steps:
            step()
    times = [[step.seconds() for step in steps] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return list(zip(medians, used, first, strict=True))


def main() -> None:
    """Measure on every device that there is."""
    keep_freed_memory()  # as the command does
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    console, results = Console(), []
    variants = [v for v in VARIANTS if not (v.compiled and options.eager)] + [*(BLOCKS if options.blocks else ())]
    for device, dtype in settings():
        console.print(f"{device}, {dtype} ...", highlight=False)
        rows = measure(maker(options, device, dtype), variants, options.repeats, device == "cuda")
        name = str(dtype).removeprefix("torch.")
        results += [Result(device, name, v.name, *row) for v, row in zip(variants, rows, strict=True)]
    console.print(table(results))
    about = {name: version(name) for name in ("torch", "timm")}
    about |= {"device": device_name(), "threads": torch.get_num_threads(), **vars(options)}
    about["results"] = [asdict(result) for result in results]
    print(json.dumps(about))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory of a quantized training step, over the float step.")
    parser.add_argument("--batch", type=int, default=16, help="crops in a step (16)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each variant (7)")
    parser.add_argument("--bits", type=int, default=4, help="width of weights and activations (4)")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm model (deit_tiny_patch16_224)")
    parser.add_argument("--model_args", type=json.loads, help="JSON of further arguments of the timm constructor")
    parser.add_argument("--eager", action="store_true", help="leave out what torch.compile compiles")
    parser.add_argument("--blocks", action="store_true", help="also compile whole blocks, for comparison")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; PyTorch's choice when not given")
    return parser.parse_args()


def settings() -> list[tuple[str, torch.dtype]]:
    """Device and dtype of every measurement."""
    gpu = [("cuda", torch.float32), ("cuda", torch.bfloat16)] if torch.cuda.is_available() else []
    return [("cpu", torch.float32), *gpu]


def maker(options: argparse.Namespace, device: str, dtype: torch.dtype) -> Callable[[Variant], Step]:
    """Builds a variant: same weights, same batch."""

    def make(variant: Variant) -> Step:
        torch.manual_seed(0)
        bits = {"recipe": "vvtq", "w_bits": options.bits, "a_bits": options.bits} if variant.quantized else {}
        module = QATModule(
            ModelOptions(options.model, None, model_args=options.model_args, compile=variant.compiled, **bits)
        )
        size, classes = module.preprocessing.size, module.card.num_classes
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (options.batch, 3, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(classes, (options.batch,), generator=generator)
        return Step(module, Batch(images.to(device), labels.to(device), (), ()), dtype, variant)

    return make


def device_name() -> str:
    """The GPU, else the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def table(results: list[Result]) -> Table:
    """One line per variant, for a terminal of 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, caption="memory: on a GPU the peak of a step, on a CPU what is kept for backward")
    for name in ("device", "dtype", "step", "s", "ratio", "MB", "ratio"):
        made.add_column(name, justify="left" if name in ("device", "dtype", "step") else "right", no_wrap=True)
    for r in results:
        base = next(b for b in results if (b.device, b.dtype) == (r.device, r.dtype))
        ratios = [f"{r.seconds / base.seconds:.2f}", f"{r.bytes / base.bytes:.2f}"]
        made.add_row(r.device, r.dtype, r.variant, f"{r.seconds:.4f}", ratios[0], f"{r.bytes / 1e6:.0f}", ratios[1])
    return made


if __name__ == "__main__":
    main()
