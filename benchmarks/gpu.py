"""Everything that docs/results.md still lacks of a GPU, in one run of less than eight minutes.

    python benchmarks/gpu.py --out gpu.json                      -> on one GPU; random weights and generated images
    python benchmarks/gpu.py --data DIR --checkpoint FILE        -> with real images and float weights
    python benchmarks/gpu.py --device cpu --quick                -> a rehearsal: every line of code, tiny sizes

Each part runs in a process of its own and has a time limit. What a part has measured until it fails, or until its time
is over, is kept, its error is recorded, and the next part runs. Parts:

    training     seconds and memory of a step over the float step of timm, as `benchmarks/train_step.py` measures it
    pipeline     training crops per second, from files to the device, at 1 and 4 crops per image
    labels       crops per second that `qat make-softlabels` labels
    calibration  seconds of every method, with peak memory
    evaluation   seconds of a batch over those of the float model
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_parts import PARTS, Row
from rich import box
from rich.console import Console
from rich.table import Table
from train_step import device_name

LIMITS = {"training": 170, "pipeline": 40, "labels": 110, "calibration": 80, "evaluation": 60}  # seconds


def run_part(name: str, words: list[str], limit: float) -> Row:
    """Rows of a part that runs in another process, the seconds that it took, and its error if there was one."""
    started, error = time.perf_counter(), None
    try:
        done = subprocess.run([sys.executable, __file__, *words, "--one", name], capture_output=True, timeout=limit)
        out = done.stdout
        if done.returncode:
            error = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired as expired:
        out, error = expired.stdout or b"", f"stopped after {limit:.0f} s"
    rows = [json.loads(line) for line in out.decode().splitlines() if line.startswith("{")]
    return {"rows": rows, "seconds": round(time.perf_counter() - started, 1), "error": error}


def table(found: list[Row]) -> Table:
    """The rows of a part."""
    made = Table(box=box.SIMPLE_HEAD)
    for column in found[0] if found else ():
        made.add_column(column, no_wrap=True)
    for row in found:
        made.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return made


def read_options(words: list[str]) -> argparse.Namespace:
    """The command line, and what follows from it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file to write (gpu.json)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and nothing compiled")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="all when not given")
    parser.add_argument("--model", help="timm model (deit_tiny_patch16_224)")
    parser.add_argument("--model_args", type=json.loads, help="JSON of further arguments of the timm constructor")
    parser.add_argument("--batch", type=int, help="images, or crops, in a forward pass (128)")
    parser.add_argument("--checkpoint", help="float weights of the model; random when not given")
    parser.add_argument("--data", type=Path, help="folder with train/<class>/*; generated when not given")
    parser.add_argument("--one", choices=LIMITS, help=argparse.SUPPRESS)  # a part, in a process of its own
    o = parser.parse_args(words)
    o.model = o.model or "deit_tiny_patch16_224"
    o.model_args = o.model_args or ({"img_size": 32, "embed_dim": 24, "depth": 2} if o.quick else None)
    o.batch = o.batch or (4 if o.quick else 128)
    o.images, o.copies, o.repeats, o.seconds = (16, 2, 1, 0.1) if o.quick else (512, 8, 15, 8.0)
    o.workers = 0 if o.quick else min(len(os.sched_getaffinity(0)), 16)
    o.teachers = (
        {"test_vit": 8} if o.quick else {"deit_base_patch16_224": 2048, "tf_efficientnet_l2.ns_jft_in1k_475": 64}
    )
    return o


def main(words: list[str]) -> int:
    """Measure all parts, print the tables and write the file; 0 when no part failed."""
    o = read_options(words)
    if o.device == "cpu":
        torch.set_num_threads(1)  # a rehearsal on a machine that may be busy
    if o.one:
        for row in PARTS[o.one](o):
            print(json.dumps(row), flush=True)
        return 0
    if o.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device: give --device cpu --quick for a rehearsal")
    about = {name: version(name) for name in ("torch", "timm", "lightning", "qat")}
    about |= {"device": device_name() if o.device == "cuda" else "CPU", "cores": len(os.sched_getaffinity(0))}
    found = {}
    for name in o.parts:
        print(f"{name} (at most {LIMITS[name]} s) ...", flush=True)
        found[name] = run_part(name, words, LIMITS[name])
        Console(width=140).print(table(found[name]["rows"]))
        if found[name]["error"]:
            print(f"{name} FAILED: {found[name]['error']}")
        o.out.write_text(json.dumps({**about, "options": vars(o), "parts": found}, indent=1, default=str) + "\n")
    print(f"wrote {o.out}")
    return int(any(part["error"] for part in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
