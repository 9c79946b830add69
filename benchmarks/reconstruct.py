"""What an iteration of reconstruction costs, over a forward and a backward of the same block in floating point.

    python benchmarks/reconstruct.py                                -> two minutes on 2 cores
    python benchmarks/reconstruct.py --device cuda --batch 32

A block of a model with random weights reads random tokens. In every turn comes an iteration as `Reconstruct` does it,
and then one of timm's own block, which trains all of its weights by the squared error; ratios of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qat import build_float, build_recipe, quantize
from qat.ptq import Reconstruct, Steps, TensorSearch
from qat.ptq.glf_q import SuffixFeature
from qat.ptq.reconstruction import reconstruct
from qat.ptq.reconstruction.low_rank import LowRank
from qat.ptq.reconstruction.straight_through import StraightThrough
from qat.ptq.reconstruction.training import Training
from qat.runs.process import keep_freed_memory

BLOCK = 1  # the second one: its inputs come from a quantized block
CASES: dict[str, dict[str, Any]] = {
    "AdaRound": {},
    "AdaRound, half of all values quantized (QDrop)": {"keep": 0.5, "input": "mixed"},
    "straight-through": {"weights": StraightThrough()},
    "low rank, 20": {"weights": LowRank(rank=20)},
    "straight-through, feature of the head (GLF-Q)": {"weights": StraightThrough(), "loss": SuffixFeature()},
}


class Enough(Exception):
    """Ends a calibration."""


def measure(args: argparse.Namespace, options: dict[str, Any]) -> tuple[float, float]:
    """Median seconds of an iteration, and of one in floating point."""
    device, turns = torch.device(args.device), list[tuple[float, float]]()
    blocks: Any = build_float(args.arch, None).to(device).eval().blocks

    class Timed(Training):
        def iterate(self, adam: Any, picks: Tensor, progress: float) -> None:
            if self.data.here.unit.name != f"blocks.{BLOCK}":
                return
            ours = timed(lambda: super(Timed, self).iterate(adam, picks, progress), device)
            x, target = self.data.inputs[picks], self.data.targets[picks]
            turns.append((ours, timed(lambda: float_iteration(blocks[BLOCK], x, target), device)))
            if len(turns) == args.repeats:
                raise Enough

    model = quantize(build_float(args.arch, None).eval(), build_recipe(args.recipe, w_bits=4, a_bits=4)).to(device)
    step = Reconstruct(iterations=args.repeats, batch=args.batch, **options)
    images = [torch.randn(args.batch, 3, 224, 224, device=device) for _ in range(2)]
    reconstruct.Training = Timed  # type: ignore[misc]
    with contextlib.suppress(Enough):
        Steps([TensorSearch(), step])(model, images)
    kept = turns[len(turns) // 4 :]  # the first ones find memory and kernels
    return median(ours for ours, _ in kept), median(bare for _, bare in kept)


def float_iteration(block: nn.Module, x: Tensor, target: Tensor) -> None:
    """Forward and backward of a float block."""
    block.requires_grad_(True)
    block.zero_grad()
    (block(x) - target).square().mean().backward()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes, on a GPU to its end."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="deit_tiny_patch16_224")
    parser.add_argument("--recipe", default="frontier")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    keep_freed_memory()
    print(f"{args.arch}, {args.recipe}, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads")
    for name, options in CASES.items():
        ours, bare = measure(args, options)
        print(f"{name:50} {1000 * ours:8.1f} ms, float {1000 * bare:8.1f} ms, ratio {ours / bare:.2f}", flush=True)


if __name__ == "__main__":
    main()
