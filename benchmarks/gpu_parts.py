"""The parts of `benchmarks/gpu.py`: each yields its rows as it measures them. ``o`` are the options of that script."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from softlabels import generated
from torch import Tensor, nn
from train_step import VARIANTS, maker, measure

from qat import build_float, build_recipe, quantize
from qat.callbacks.calibrate import PeakMemory
from qat.data.folder import wnids
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.labeling.make import make_softlabels
from qat.labeling.plan import Folder
from qat.labeling.plan import Options as LabelOptions
from qat.models import default_preprocessing
from qat.ptq import InitSteps, Observe, OutputSearch, PTQMethod, RepQViT

SETTINGS = {  # of a training step: dtype of autocast, and what torch.set_float32_matmul_precision gets
    "float32": (torch.float32, "highest"),
    "float32, TF32 products": (torch.float32, "high"),
    "bfloat16 autocast": (torch.bfloat16, "highest"),
}
METHODS: tuple[tuple[str, int, int, PTQMethod], ...] = (  # recipe, width, images, method
    ("vvtq", 4, 32, InitSteps()),
    ("uniform_full", 8, 256, Observe("minmax")),
    ("uniform_full", 8, 256, Observe("percentile")),
    ("uniform_full", 8, 256, Observe("omse")),
    ("repq_vit", 4, 32, RepQViT()),
    ("uniform", 4, 32, OutputSearch()),
)
EVALUATED: tuple[tuple[str, int, PTQMethod], ...] = (
    ("vvtq", 4, InitSteps()),
    ("repq_vit", 4, RepQViT()),
    ("bitlog2_half_16", 4, RepQViT()),
    ("fq_vit_888", 8, Observe("minmax")),
    ("fq_vit_884", 8, Observe("minmax")),
)
CROPS = 16  # that a teacher labels of each image
Row = dict[str, Any]


def training(o: argparse.Namespace) -> Iterator[Row]:
    """One row for each variant and setting."""
    variants = [variant for variant in VARIANTS if not (variant.compiled and o.quick)]
    options = argparse.Namespace(model=o.model, model_args=o.model_args, batch=o.batch, bits=4)
    for name, (dtype, precision) in SETTINGS.items():
        torch.set_float32_matmul_precision(precision)
        rows = measure(maker(options, o.device, dtype), variants, o.repeats, o.device == "cuda")
        for variant, (seconds, used, first) in zip(variants, rows, strict=True):
            yield {"setting": name, "step": variant.name, "seconds": seconds, "over float": seconds / rows[0][0],
                   "MB": used / 1e6, "MB over float": used / rows[0][1], "first steps, s": first}  # fmt: skip


def pipeline(o: argparse.Namespace) -> Iterator[Row]:
    """One row for each number of crops per image; the clock of an epoch starts when its first batch has arrived."""
    with folder_of_images(o) as root:
        for crops in (1, 4):
            data = ImageNetDataModule(data_options(o, root, batch_size=4 * o.batch, crops_per_image=crops))
            started, count, seconds = time.perf_counter(), 0, 0.0
            while time.perf_counter() - started < o.seconds:
                batches = iter(data.train_dataloader())
                next(batches)
                began = time.perf_counter()
                count += sum(len(batch.images.to(o.device, non_blocking=True)) for batch in batches)
                wait(o)
                seconds += time.perf_counter() - began
            yield {"crops per image": crops, "workers": data.workers, "crops/s": count / seconds}


def labels(o: argparse.Namespace) -> Iterator[Row]:
    """One row for each teacher: the difference between a long and a short run, which start alike."""
    for teacher, images in o.teachers.items():
        with folder_of_images(o) as root, TemporaryDirectory() as scratch:
            weights = Path(scratch) / "teacher.safetensors"
            save_file(build_float(teacher, None).state_dict(), weights)
            times = []
            for share in (0.25, 1.0):
                part = subset(root, Path(scratch) / f"{share}", round(share * images))
                options = LabelOptions(
                    Folder(part), teacher, Path(scratch) / f"{share}.h5", str(weights), CROPS, workers=o.workers,
                    batch_size=min(o.batch, 64), accelerator=o.device, devices=1,
                )  # fmt: skip
                started = time.perf_counter()
                make_softlabels(options)
                times.append(time.perf_counter() - started)
            rate = CROPS * (images - round(0.25 * images)) / (times[1] - times[0])
            yield {"teacher": teacher, "pixels": default_preprocessing(teacher).size, "crops/s": rate}


def calibration(o: argparse.Namespace) -> Iterator[Row]:
    """One row for each method."""
    for recipe, bits, count, method in METHODS:
        count = min(count, o.images)
        batches = calibration_images(o, count)
        model = quantized(o, recipe, bits)
        wait(o)
        started = time.perf_counter()
        with PeakMemory(torch.device(o.device)) as memory:
            method(model, batches)
            wait(o)
        seconds = time.perf_counter() - started
        yield {"method": repr(method), "recipe": recipe, "bits": bits, "images": count, "seconds": seconds,
               "MB": memory.megabytes}  # fmt: skip


@torch.no_grad()
def evaluation(o: argparse.Namespace) -> Iterator[Row]:
    """One row for each recipe: medians of batches that the float and the quantized model see in turn."""
    images = torch.cat(calibration_images(o, min(o.batch, o.images)))
    images = images.repeat(-(-o.batch // len(images)), 1, 1, 1)[: o.batch]
    plain = build_float(o.model, o.checkpoint, None, o.model_args).eval().to(o.device)
    for recipe, bits, method in EVALUATED:
        model = quantized(o, recipe, bits)
        method(model, [images[:32]])
        pairs = [(seconds(o, plain, images), seconds(o, model, images)) for _ in range(o.repeats + 2)][2:]
        times = [median(column) for column in zip(*pairs, strict=True)]
        yield {"recipe": recipe, "bits": bits, "batch": len(images), "seconds": times[1], "float, s": times[0],
               "over float": median(b / a for a, b in pairs)}  # fmt: skip


def seconds(o: argparse.Namespace, model: nn.Module, images: Tensor) -> float:
    """Of one forward pass, the work on the device included."""
    wait(o)
    started = time.perf_counter()
    model(images)
    wait(o)
    return time.perf_counter() - started


def wait(o: argparse.Namespace) -> None:
    """Until the device is idle."""
    if o.device == "cuda":
        torch.cuda.synchronize()


def quantized(o: argparse.Namespace, recipe: str, bits: int) -> nn.Module:
    """A model on the device that is still to be calibrated."""
    torch.manual_seed(0)
    rules = build_recipe(recipe, w_bits=bits, a_bits=bits)
    return quantize(build_float(o.model, o.checkpoint, None, o.model_args).eval(), rules).to(o.device)


def calibration_images(o: argparse.Namespace, count: int) -> list[Tensor]:
    """Normalized batches of at most 32 images on the device: of the data if there is some, else noise."""
    preprocessing = default_preprocessing(o.model, o.model_args)
    if o.data is not None:
        found = list(ImageNetDataModule(data_options(o, o.data)).calibration_batches(count, 32, 0))
    else:
        shape, generator = (count, 3, preprocessing.size, preprocessing.size), torch.Generator().manual_seed(0)
        found = list(torch.randint(256, shape, dtype=torch.uint8, generator=generator).split(32))
    return [preprocessing.normalize(batch.to(o.device)) for batch in found]


def data_options(o: argparse.Namespace, root: Path, **options: Any) -> DataOptions:
    """The data module's options for this model."""
    return DataOptions(
        root, workers=o.workers, preprocessing=default_preprocessing(o.model, o.model_args).to_dict(), **options
    )


@contextmanager
def folder_of_images(o: argparse.Namespace) -> Iterator[Path]:
    """The data, or a folder of generated images, each under several names."""
    if o.data is not None:
        yield o.data
        return
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        generated(root, o.images)
        for split in ("train", "val"):
            for name, wnid in zip([f"c{i}" for i in range(8)], wnids(), strict=False):
                (root / split / name).rename(root / split / wnid)
        for path in list((root / "train").glob("*/*.jpg")):
            for copy in range(1, o.copies):
                os.link(path, path.with_stem(f"{path.stem}_{copy}"))
        yield root


def subset(root: Path, part: Path, count: int) -> Path:
    """A folder with ``count`` of the training images."""
    for path in sorted((root / "train").glob("*/*"))[:count]:
        link = part / "train" / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute())
    return part


PARTS = {part.__name__: part for part in (training, pipeline, labels, calibration, evaluation)}
