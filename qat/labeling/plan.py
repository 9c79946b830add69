"""What soft labels are to be made, checked against the images and against what is there already. Shapes: N images."""

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
from qat.data.crops import CropLaw
from qat.data.folder import class_names, find_images
from qat.data.softlabels.store import Header, create, first_difference, names_in, open_store, row_bytes, sha256_of
from qat.data.softlabels.writer import FLUSH_SECONDS, absorb
from qat.errors import QatError
from qat.preprocessing import Preprocessing

SPLIT = "train"
NAMES = {  # of options, where the store has other ones
    "num_crops": "crops",
    "top_k": "topk",
    "flip_p": "flip",
    "teacher_sha256": "teacher_checkpoint",
    "teacher_interpolation": "interpolation",
}


@dataclass(frozen=True)
class Folder:
    """Where the images are.

    Args:
        root: folder that holds train/<class>/*; all images of train are labelled.
    """

    root: Path


@dataclass(frozen=True)
class Options:
    """What to label, with which teacher, and how.

    Args:
        data: the images.
        teacher: timm model whose probabilities are stored; its input size, interpolation, mean and deviation are used.
        out: file to write; an unfinished one goes on, if it was made with the same options.
        teacher_checkpoint: weights of the teacher: pretrained (those that timm names), a local file, or a checkpoint
            that `qat fit` wrote.
        crops: random crops per image.
        topk: classes stored per crop, the most probable ones.
        label_type: marginal_smoothing spreads the remaining probability over the other classes, marginal_renorm divides
            by the sum of the stored ones, hard is the most probable class alone (topk 1).
        temperature: logits are divided by it.
        crop_scale: lowest and highest area of a crop, as a part of the image.
        crop_ratio: lowest and highest width / height of a crop.
        flip: probability that a crop is mirrored left to right.
        seed: fixes the crops, with the number of the image.
        batch_size: crops per forward of the teacher.
        precision: of the teacher, as Lightning names it; 16-mixed on a GPU and 32-true elsewhere when null.
        workers: processes that decode images, for each device; as many as cores, at most 8, when null.
        on_bad_image: what an unreadable image does: stop, or be left without labels, with a warning.
        flush_seconds: seconds between two writes to the disk, so the most work that a kill can cost.
        accelerator: cpu, gpu, ..., or auto.
        devices: number of devices per node, each with a process of its own, or auto.
        num_nodes: nodes; the same command is started on each, by torchrun or SLURM.
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
    def law(self) -> CropLaw:
        """Of the crops."""
        return CropLaw(self.crop_scale, self.crop_ratio, self.flip)


@dataclass(frozen=True)
class Plan:
    """The labels that the options ask for; QatError for options that no store can have.

    Args:
        options: as given.
        preprocessing: of the teacher.
        teacher_sha256: of its weights.
        precision: of its forward.
    """

    options: Options
    preprocessing: Preprocessing
    teacher_sha256: str
    precision: str

    @property
    def folder(self) -> Path:
        """Of the images."""
        return self.options.data.root / SPLIT

    @property
    def paths(self) -> Sequence[str]:
        """Of the images, relative to the folder."""
        return find_images(self.folder)

    def header(self) -> Header:
        """What the store says of its labels."""
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
            crop_scale=options.law.scale,
            crop_ratio=options.law.ratio,
            flip_p=options.law.flip,
            seed=options.seed,
            batch_size=options.batch_size,
            precision=self.precision,
            split=SPLIT,
            class_list_sha256=sha256_of(classes),
            path_list_sha256=sha256_of(self.paths),
        )

    def prepare(self) -> None:
        """Create the store, or go on with it and the parts that processes left; QatError if it was made otherwise."""
        prepare(self.options.out, self.header(), self.paths, class_names(self.folder))
        self.join()

    def create(self, path: Path) -> None:
        """An empty store of this plan."""
        create(path, self.header(), self.paths, class_names(self.folder), software())

    def part(self, rank: int) -> Path:
        """The file that one of several processes writes."""
        return self.options.out.with_name(f"{self.options.out.name}.rank{rank}")

    def join(self) -> None:
        """Bring together what several processes have made, also what a killed run left."""
        out = self.options.out
        for unborn in _beside(out, r"(\.rank\d+)?\.new"):  # killed while it was created
            unborn.unlink()
        for part in _beside(out, r"\.rank\d+"):
            absorb(out, part)


def _beside(out: Path, ending: str) -> list[Path]:
    """Files whose name is that of ``out`` with an ending."""
    return sorted(path for path in out.parent.iterdir() if re.fullmatch(re.escape(out.name) + ending, path.name))


def check_out(out: Path) -> None:
    """QatError for a file that cannot be written."""
    if out.is_dir():
        raise QatError(f"out is {out}, a folder: give the name of a file")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise QatError(f"out is {out}: there is no folder {out.parent} that can be written")


def prepare(out: Path, header: Header, paths: Sequence[str], classes: Sequence[str]) -> None:
    """Create a store, or look at the one that is there; QatError if that was begun otherwise and has labels."""
    if not out.exists() or _is_empty(out):
        needed, free = len(paths) * row_bytes(header), shutil.disk_usage(out.parent).free
        if needed > free:
            raise QatError(f"out is {out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free there")
        create(out, header, paths, classes, software())
    with open_store(out) as file:
        stored = Header.from_attrs(file.attrs, out)
        if stored.path_list_sha256 != header.path_list_sha256:
            difference = first_difference(names_in(file, "path"), paths)
            raise QatError(f"out is {out}, whose labels are of other images than those of data.root: {difference}")
    pairs = [(field.name, getattr(stored, field.name), getattr(header, field.name)) for field in fields(Header)]
    different = [f"{NAMES.get(name, name)} {theirs} -> {ours}" for name, theirs, ours in pairs if theirs != ours]
    if different:
        raise QatError(
            f"out is {out}, which was begun with other options ({', '.join(different)}): "
            "give those again to go on, or another file"
        )


def _is_empty(out: Path) -> bool:
    """Whether a store has no labels yet, and no process has left some."""
    with open_store(out) as file:
        return not file["done"][:].any() and not _beside(out, r"\.rank\d+")


def sha256_of_weights(model: nn.Module) -> str:
    """Of names, shapes, types and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def software() -> str:
    """The versions that made a store; for the reader, nothing depends on them."""
    return f"qat {qat.__version__}, torch {torch.__version__}, timm {version('timm')}"
