"""Seconds and memory of a quantised training step, over those of the float step of plain timm.

    python benchmarks/train_step.py                -> CPU and, where there is one, GPU (float32 and bfloat16 autocast)

A step is what `qat fit` does with a batch that is on the device: normalise uint8 crops, forward, cross-entropy with
labels, backward, AdamW, `project_`. The float step is the same with timm's own model and its fused attention. Both run
in turn, in one process, on one batch; the median of their times is reported. The ratio is the figure of merit: a time
depends on the machine and its load, a ratio within one run far less.

Memory on a GPU is the peak that the allocator reports during one step, everything included. A CPU has no such number:
the peak of the resident set is mostly libraries and what the allocator holds back. There, bytes are counted instead:
the distinct storages that autograd keeps for backward, parameters left out. That is what grows with the batch and what
quantisation changes; weights, gradients and optimizer state are the same for both. It leaves out tensors that live only
inside an operator.

Shapes: B crops of S x S pixels, C classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qat.data.images import Batch
from qat.insert import quantizers
from qat.module import QATModule
from qat.ptq import InitSteps

WARM_UP = 2


@dataclass(frozen=True)
class Result:
    """Both variants in one setting: medians in seconds, memory in bytes."""

    device: str
    dtype: str
    float_seconds: float
    quantised_seconds: float
    float_bytes: int
    quantised_bytes: int

    @property
    def ratios(self) -> tuple[float, float]:
        """Quantised over float: seconds, bytes."""
        return self.quantised_seconds / self.float_seconds, self.quantised_bytes / self.float_bytes


class Step:
    """One training step of a module on one synthetic batch.

    Args:
        module: float, or quantised and not yet calibrated.
        batch: crops on the device.
        dtype: of autocast; float32 leaves it off.
    """

    def __init__(self, module: QATModule, batch: Batch, dtype: torch.dtype) -> None:
        self.module, self.batch, self.dtype = module.to(batch.images.device), batch, dtype
        InitSteps()(self.module.model.eval(), [module.preprocessing.normalize(batch.images)])
        self.module.train()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-5)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for _, quantizer in quantizers(self.module.model):
            quantizer.project_()

    def loss(self) -> Tensor:
        """The forward pass."""
        with torch.autocast(self.batch.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module.loss(self.module(self.batch.images), self.batch)

    def seconds(self) -> float:
        """Wall-clock time of one step, the work on the device included."""
        wait = torch.cuda.synchronize if self.batch.images.is_cuda else lambda: None
        wait()
        started = time.perf_counter()
        self()
        wait()
        return time.perf_counter() - started


def saved_bytes(step: Step) -> int:
    """Bytes of the distinct storages, parameters left out, that autograd keeps between forward and backward."""
    own = {p.untyped_storage().data_ptr() for p in step.module.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()  # alive until backward, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.loss().backward()
    step.optimizer.zero_grad()
    return sum(seen.values())


def peak_bytes(step: Step) -> int:
    """Peak of the GPU's allocator in one step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def measure(make: Callable[[bool], Step], repeats: int, where: tuple[str, str]) -> Result:
    """Time both variants in turn; ``make(quantised)`` builds one. Memory of each is measured while it is alone."""
    on_gpu = where[0] == "cuda"
    used = []
    for quantised in (False, True):
        step = make(quantised)
        for _ in range(WARM_UP):
            step()
        used.append(peak_bytes(step) if on_gpu else saved_bytes(step))
        del step
    steps = [make(False), make(True)]
    for _ in range(WARM_UP):
        for step in steps:
            step()
    times = [[step.seconds() for step in steps] for _ in range(repeats)]
    plain, quantised = (statistics.median(column) for column in zip(*times, strict=True))
    return Result(*where, plain, quantised, *used)


def main() -> None:
    """Measure on every device that there is."""
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    console, results = Console(), []
    for device, dtype in settings():
        console.print(f"{device}, {dtype} ...", highlight=False)
        make = maker(options, device, dtype)
        results.append(measure(make, options.repeats, (device, str(dtype).removeprefix("torch."))))
    console.print(table(results))
    about = {name: version(name) for name in ("torch", "timm")}
    about |= {"device": device_name(), "threads": torch.get_num_threads(), **vars(options)}
    about["results"] = [asdict(result) for result in results]
    print(json.dumps(about))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory of a quantised training step, over the float step.")
    parser.add_argument("--batch", type=int, default=16, help="crops in a step (16)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each variant (7)")
    parser.add_argument("--bits", type=int, default=4, help="width of weights and activations (4)")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm model (deit_tiny_patch16_224)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; PyTorch's choice when not given")
    return parser.parse_args()


def settings() -> list[tuple[str, torch.dtype]]:
    """Device and dtype of every measurement."""
    gpu = [("cuda", torch.float32), ("cuda", torch.bfloat16)] if torch.cuda.is_available() else []
    return [("cpu", torch.float32), *gpu]


def maker(options: argparse.Namespace, device: str, dtype: torch.dtype) -> Callable[[bool], Step]:
    """Builds a variant: same weights, same batch."""

    def make(quantised: bool) -> Step:
        torch.manual_seed(0)
        bits = {"recipe": "vvtq", "w_bits": options.bits, "a_bits": options.bits} if quantised else {}
        module = QATModule(arch=options.model, checkpoint=None, **bits)
        size, classes = module.preprocessing.size, module.card.num_classes
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (options.batch, 3, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(classes, (options.batch,), generator=generator)
        return Step(module, Batch(images.to(device), labels.to(device), (), ()), dtype)

    return make


def device_name() -> str:
    """The GPU, else the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def table(results: list[Result]) -> Table:
    """One line per setting, for a terminal of 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, caption="memory: on a GPU the peak of a step, on a CPU what is kept for backward")
    for name in ("device", "dtype", "float s", "quant s", "ratio", "float MB", "quant MB", "ratio"):
        made.add_column(name, justify="left" if name in ("device", "dtype") else "right", no_wrap=True)
    for r in results:
        seconds, memory = (f"{ratio:.2f}" for ratio in r.ratios)
        size = [f"{value / 1e6:.0f}" for value in (r.float_bytes, r.quantised_bytes)]
        times = [f"{value:.4f}" for value in (r.float_seconds, r.quantised_seconds)]
        made.add_row(r.device, r.dtype, *times, seconds, *size, memory)
    return made


if __name__ == "__main__":
    main()
