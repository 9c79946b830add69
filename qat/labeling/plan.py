"""The options of making soft labels, checked against the images and against the labels that exist already."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import qat
from qat.data.crops import CropDistribution
from qat.data.folder import class_names, find_images
from qat.data.softlabels.opening import first_difference, names_in, open_store
from qat.data.softlabels.store import Header, create, row_bytes, sha256_of
from qat.data.softlabels.writer import FLUSH_SECONDS, absorb
from qat.errors import QatError
from qat.preprocessing import Preprocessing

SPLIT = "train"
OPTIONS = {  # attributes of a store whose options have other names
    "num_crops": "crops",
    "top_k": "topk",
    "flip_p": "flip",
    "teacher_sha256": "teacher_checkpoint",
    "teacher_interpolation": "interpolation",
}


@dataclass(frozen=True)
class Folder:
    """The images.

    Args:
        root: folder that holds train/<class>/*; all images of train are labeled.
    """

    root: Path


@dataclass(frozen=True)
class Options:
    """What to label, with which teacher, and how.

    Args:
        data: the images.
        teacher: timm model whose probabilities are stored; it sees crops in its own size and normalization.
        out: file to write; an unfinished one is continued if it was begun with the same options.
        teacher_checkpoint: weights of the teacher: pretrained (those that timm names), a local file, or a checkpoint
            that `qat fit` wrote.
        crops: random crops per image.
        topk: classes stored per crop, the most probable ones.
        label_type: marginal_smoothing spreads the remaining probability over the other classes, marginal_renorm divides
            by the sum of the stored ones, hard is the most probable class alone (topk 1).
        temperature: logits are divided by it.
        crop_scale: lowest and highest area of a crop, as a fraction of the image.
        crop_ratio: lowest and highest width / height of a crop.
        flip: probability that a crop is mirrored left to right.
        seed: fixes the crops, together with the number of the image.
        batch_size: crops per forward pass of the teacher.
        precision: precision of the teacher, as Lightning names it; 16-mixed on a GPU, else 32-true, when null.
        workers: processes that decode images, for each device; as many as cores, at most 8, when null.
        on_bad_image: what happens to an image that cannot be read: error stops the work, skip leaves it without labels.
        flush_seconds: seconds between two writes to the disk, and so the most work that a kill can cost.
        accelerator: cpu, gpu, ..., or auto.
        devices: number of devices per node, each with a process of its own, or auto.
        num_nodes: number of nodes; torchrun or SLURM starts the same command on each.
    """

    data: Folder
    teacher: str
    out: Path
    teacher_checkpoint: str = "pretrained"
    crops: int = 500
    topk: int = 5
    label_type: Literal["marginal_smoothing", "marginal_renorm", "hard"] = "marginal_smoothing"
    temperature: float = 1.0
    crop_scale: tuple[float, float] = (0.08, 0.936)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    seed: int = 0
    batch_size: int = 128
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] | None = None
    workers: int | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    flush_seconds: float = FLUSH_SECONDS
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for name, lowest in (("crops", 1), ("batch_size", 1), ("seed", 0), ("num_nodes", 1), ("workers", 0)):
            if (value := getattr(self, name)) is not None and value < lowest:
                raise QatError(f"{name} is {value}: it must be at least {lowest}")
        if not self.flush_seconds > 0:
            raise QatError(f"flush_seconds is {self.flush_seconds}: it must be positive")
        check_out(self.out)

    @property
    def crop_distribution(self) -> CropDistribution:
        """The distribution of the crops that these options describe."""
        return CropDistribution(self.crop_scale, self.crop_ratio, self.flip)


@dataclass(frozen=True)
class Plan:
    """The store to make, and the images to label.

    Args:
        options: the options of the command.
        preprocessing: what the teacher expects.
        teacher_sha256: hash of the teacher's weights.
        precision: precision of the teacher's forward passes.
    """

    options: Options
    preprocessing: Preprocessing
    teacher_sha256: str
    precision: str

    @property
    def folder(self) -> Path:
        """The folder that holds the class folders."""
        return self.options.data.root / SPLIT

    @property
    def paths(self) -> Sequence[str]:
        """The paths of the images, relative to the folder."""
        return find_images(self.folder)

    def header(self) -> Header:
        """The header of the store; QatError for options that no store can have."""
        options, seen, classes = self.options, self.preprocessing, class_names(self.folder)
        return Header(
            teacher=options.teacher,
            teacher_sha256=self.teacher_sha256,
            teacher_input_size=seen.size,
            teacher_interpolation=seen.interpolation,
            mean=seen.mean,
            std=seen.std,
            temperature=options.temperature,
            label_type=options.label_type,
            top_k=options.topk,
            num_crops=options.crops,
            num_classes=len(classes),
            crop_scale=options.crop_distribution.scale,
            crop_ratio=options.crop_distribution.ratio,
            flip_p=options.crop_distribution.flip,
            seed=options.seed,
            batch_size=options.batch_size,
            precision=self.precision,
            split=SPLIT,
            class_list_sha256=sha256_of(classes),
            path_list_sha256=sha256_of(self.paths),
        )

    def prepare(self) -> None:
        """Create the store, or continue one, with the parts that a killed run left; QatError for other options."""
        prepare(self.options.out, self.header(), self.paths, class_names(self.folder))
        self.merge_parts()

    def create(self, path: Path) -> None:
        """Create an empty store for the labels of this plan."""
        create(path, self.header(), self.paths, class_names(self.folder), software())

    def part(self, rank: int) -> Path:
        """The store that one of several processes writes."""
        return self.options.out.with_name(f"{self.options.out.name}.rank{rank}")

    def merge_parts(self) -> None:
        """Copy the labels of all processes into one store, also those that a killed run left."""
        out = self.options.out
        for incomplete in _beside(out, r"(\.rank\d+)?\.new"):  # a process was killed while it created the file
            incomplete.unlink()
        for part in _beside(out, r"\.rank\d+"):
            absorb(out, part)


def _beside(out: Path, ending: str) -> list[Path]:
    """Sorted files beside ``out`` whose name is that of ``out`` followed by a match of the expression ``ending``."""
    return sorted(path for path in out.parent.iterdir() if re.fullmatch(re.escape(out.name) + ending, path.name))


def check_out(out: Path) -> None:
    """QatError for a file that cannot be written."""
    if out.is_dir():
        raise QatError(f"out is {out}, a folder: give the name of a file")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise QatError(f"out is {out}: there is no folder {out.parent} that can be written")


def prepare(out: Path, header: Header, paths: Sequence[str], classes: Sequence[str]) -> None:
    """Create a store, or check one that exists; an existing one without labels is created anew.

    Raises:
        QatError: the store has labels of other images or of other options, or the disk has too little space.
    """
    if not out.exists() or _is_empty(out):
        needed, free = len(paths) * row_bytes(header), shutil.disk_usage(out.parent).free
        if needed > free:
            raise QatError(f"out is {out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free there")
        create(out, header, paths, classes, software())
    with open_store(out) as file:
        stored = Header.from_attrs(file.attrs, out)
        if stored.path_list_sha256 != header.path_list_sha256:
            difference = first_difference(names_in(file, "path"), paths)
            raise QatError(
                f"out is {out}, whose labels were made on other images than those of data.root: {difference}"
            )
    pairs = [(field.name, getattr(stored, field.name), getattr(header, field.name)) for field in fields(Header)]
    different = [f"{OPTIONS.get(name, name)} {theirs} -> {ours}" for name, theirs, ours in pairs if theirs != ours]
    if different:
        raise QatError(
            f"out is {out}, which was begun with other options ({', '.join(different)}): "
            "give those again to continue it, or give another file"
        )


def _is_empty(out: Path) -> bool:
    """Whether neither the store nor a part that a process left has labels."""
    with open_store(out) as file:
        return not file["done"][:].any() and not _beside(out, r"\.rank\d+")


def sha256_of_weights(model: nn.Module) -> str:
    """SHA-256 of the names, shapes, types and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def software() -> str:
    """The versions that make a store, for information only."""
    return f"qat {qat.__version__}, torch {torch.__version__}, timm {version('timm')}"
