"""What each part of the method is worth at W2A2 on handwritten digits: arms of equal length, several seeds each.

    python benchmarks/ablation.py --out ablation_out        -> 15 minutes on 2 cores; finished runs are not run again

The float model of `make demo` is trained once and then quantized with every arm and seed by `qat fit`. The table has
mean and standard deviation over seeds of top-1, of the training loss at the end, and of the share of low-bit weights
that oscillate. Among the first arms, LSQ, module-dependent steps and per-head steps build on each other, and the three
indented ones each add one thing to per-head steps. The other arms change the gain of the step gradients under AdamW.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
Options = dict[str, Any]


def lsq(bits: str, **options: Any) -> Options:
    """The spec of a rule that quantizes with LSQ."""
    return {"class_path": "LSQ", "init_args": {"bits": bits, **options}}


HEADS = [
    {"match": "blocks.*.attn.qkv.weight_quant", "spec": lsq("w_bits", granularity="head", grad_scale="l1")},
    {"match": "blocks.*.attn.proj.weight_quant", "spec": lsq("w_bits", granularity="head", grad_scale="l1")},
    {"match": "blocks.*.attn.[qkv]_quant", "spec": lsq("a_bits", granularity="head")},
    {"match": "blocks.*.attn.probs_quant", "spec": lsq("a_bits", granularity="head", signed=False)},
    {"match": "blocks.*.attn.proj.input_quant", "spec": lsq("a_bits", granularity="head")},
]
TRACKER = {"class_path": "OscillationTracker"}


def gains(weights: str, activations: str) -> Options:
    """Options of a model: the recipe vvtq with other gains of the step gradients in the blocks."""
    specs = [
        ("blocks.*.weight_quant", lsq("w_bits", grad_scale=weights)),
        ("blocks.*.attn.qkv.weight_quant", lsq("w_bits", granularity="qkv", grad_scale=weights)),
        ("blocks.*.input_quant", lsq("a_bits", grad_scale=activations)),
        ("blocks.*.attn.[qkv]_quant", lsq("a_bits", grad_scale=activations)),
        ("blocks.*.attn.probs_quant", lsq("a_bits", signed=False, grad_scale=activations)),
        ("blocks.*.mlp.fc2.input_quant", lsq("a_bits", signed=False, offset=True, grad_scale=activations)),
    ]
    return {"recipe": "vvtq", "rules": [{"match": match, "spec": spec} for match, spec in specs]}


def regularized(reduction: str) -> Options:
    """Options of a model: per-head steps and the bin regularizer."""
    options = {"class_path": "BinRegularizer", "init_args": {"reduction": reduction, "weight": 0.01}}
    return {"recipe": "vvtq", "rules": HEADS, "regularizers": [options]}


ARMS: dict[str, tuple[Options, list[Options]]] = {  # options of the model, callbacks
    "LSQ": ({"recipe": "lsq"}, [TRACKER]),
    "+ module-dependent steps (vvtq)": ({"recipe": "vvtq"}, [TRACKER]),
    "+ per-head steps": ({"recipe": "vvtq", "rules": HEADS}, [TRACKER]),
    "  + regularizer, sum": (regularized("sum"), [TRACKER]),
    "  + regularizer, mean": (regularized("mean"), [TRACKER]),
    "  + freezing": ({"recipe": "vvtq", "rules": HEADS}, [{"class_path": "IterativeFreezing"}]),
    "gain: weights l1, activations numel": (gains("l1", "numel"), [TRACKER]),
    "gain: numel, numel": (gains("numel", "numel"), [TRACKER]),
    "gain: none, none": (gains("none", "none"), [TRACKER]),
    "gain: l1, vvtq_act": (gains("l1", "vvtq_act"), [TRACKER]),
    "gain: l1, vvtq_act, eps 1e-12": (gains("l1", "vvtq_act") | {"eps": 1e-12}, [TRACKER]),
}


def train(out: Path, arm: str, seed: int, weights: Path) -> Options:
    """Train with an arm and a seed, unless that is done already; returns what `measured` found."""
    from qat.cli.main import run

    result = out / "results" / f"{list(ARMS).index(arm)}_{seed}.json"
    if not result.is_file():
        model, callbacks = ARMS[arm]
        config = result.with_suffix(".yaml")
        config.write_text(json.dumps({"model": model, "trainer": {"callbacks": callbacks}}))  # JSON is YAML
        args = ["fit", "--config", ROOT / "configs/demo/qat.yaml", "--config", config, "--data.root", out / "data",
                "--runs", out / "runs", "--name", result.stem, "--seed_everything", seed, "--model.w_bits", 2,
                "--model.a_bits", 2, "--model.checkpoint", weights, "--model.teacher_checkpoint", weights]  # fmt: skip
        trainer = run([str(arg) for arg in args]).trainer
        result.write_text(json.dumps(measured(Path(trainer.default_root_dir)) | {"arm": arm, "seed": seed}))
    found: Options = json.loads(result.read_text())
    return found


def measured(folder: Path) -> Options:
    """Of a run: top-1 of the last validation, mean of the last 10 losses, share of oscillating weights."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    sites = {row["site"]: row for row in csv.DictReader((folder / "oscillation.csv").open())}
    return {
        "top-1 %": [float(row["val/top1"]) for row in rows if row["val/top1"]][-1],
        "train loss": statistics.mean(losses[-10:]),
        "oscillating %": 100 * float(sites["low_bit"]["share"]),
        "frozen %": 100 * float(sites["low_bit"]["frozen"]),
    }


def float_weights(out: Path) -> Path:
    """The checkpoint of the float model, which is trained first if there is none."""
    import digits

    from qat.cli.main import run

    found = sorted((out / "runs/float").glob("*/last.ckpt"))
    if not found:
        digits.write(out / "data")
        args = ["--config", str(ROOT / "configs/demo/float.yaml"), "--data.root", str(out / "data")]
        run(["fit", *args, "--runs", str(out / "runs"), "--name", "float"])
        found = sorted((out / "runs/float").glob("*/last.ckpt"))
    return found[-1]


def table(results: list[Options]) -> Table:
    """Mean +- standard deviation over seeds of every arm."""
    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("arm", no_wrap=True)
    names = ("top-1 %", "train loss", "oscillating %", "frozen %")
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    for arm in ARMS:
        mine = [result for result in results if result["arm"] == arm]
        cells = []
        for name in names:
            values = [result[name] for result in mine]
            digits_shown = 3 if name == "train loss" else 2
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits_shown}f} +- {spread:.{digits_shown}f}")
        made.add_row(arm, *cells)
    return made


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description="What each part of the method is worth, on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("ablation_out"), help="folder for everything (ablation_out)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm (3)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (2)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads are slower on so small a model, and round differently
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        weights = pool.submit(float_weights, options.out).result()
        runs = [pool.submit(train, options.out, arm, seed, weights) for seed in range(options.seeds) for arm in ARMS]
        results = [run.result() for run in runs]
    Console(width=120).print(table(results))  # also where the output goes to a file


if __name__ == "__main__":
    main()
