"""The options of making soft labels, checked against the images and against the labels that exist already."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

from qat.data.classes import Tree
from qat.data.crops import Area, CropDistribution, Probability, Ratio
from qat.data.softlabels.store import Header, create, sha256_of
from qat.data.softlabels.writer import FLUSH_SECONDS, absorb
from qat.data.source import Source
from qat.labeling.output import beside, check_out, parts_of, prepare, software
from qat.preprocessing import Preprocessing
from qat.ranges import Range, Seed, check_fields

SPLIT = "train"


@dataclass(frozen=True)
class Folder:
    """The images.

    Args:
        root: folder that holds train/<class>/*, or train.tar, or hfds/PATH; all images of train are labeled.
        class_map: file with the label of every class folder: one class per line in the format of timm, .csv or .json.
        classes: auto gives some folders of ImageNet the labels of all 1,000 classes, folders gives them their own.
    """

    root: Path
    class_map: Path | None = None
    classes: Literal["auto", "folders"] = "auto"

    @property
    def source(self) -> Source:
        """The images; QatError if there are none."""
        return Tree(self.root).source(SPLIT)

    @property
    def class_names(self) -> Sequence[str]:
        """The classes in the order of their labels; QatError if one of the images has none of them."""
        classes = Tree(self.root, None, self.class_map, self.classes).number()
        classes.of(self.source)
        return classes.names

    @property
    def targets(self) -> Sequence[int]:
        """The label of every image."""
        return Tree(self.root, None, self.class_map, self.classes).number().of(self.source)


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
    crops: Annotated[int, Range(1, 65536)] = 500
    topk: Annotated[int, Range(1, 65536)] = 5
    label_type: Literal["marginal_smoothing", "marginal_renorm", "hard"] = "marginal_smoothing"
    temperature: Annotated[float, Range(above=0, high=1_000_000)] = 1.0
    crop_scale: tuple[Area, Area] = (0.08, 0.936)
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    seed: Seed = 0
    batch_size: Annotated[int, Range(1, 100_000)] = 128
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] | None = None
    workers: Annotated[int, Range(0, 1024)] | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    flush_seconds: Annotated[float, Range(above=0, high=1_000_000)] = FLUSH_SECONDS
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: Annotated[int, Range(1, 100_000)] = 1

    def __post_init__(self) -> None:
        check_fields(self, "")
        CropDistribution(self.crop_scale, self.crop_ratio, self.flip)
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
        processes: how many of them label.
    """

    options: Options
    preprocessing: Preprocessing
    teacher_sha256: str
    precision: str
    processes: int = 1

    @property
    def source(self) -> Source:
        """The images."""
        return self.options.data.source

    def header(self) -> Header:
        """The header of the store; QatError for options that no store can have."""
        options, seen, classes = self.options, self.preprocessing, self.options.data.class_names
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
            path_list_sha256=sha256_of(self.source.names),
        )

    def prepare(self) -> None:
        """Create the store, or continue one, with the parts that a killed run left; QatError for other options."""
        data = self.options.data
        prepare(self.options.out, self.header(), self.source.names, data.class_names, data.targets, self.processes)
        self.merge_parts()

    def create(self, path: Path) -> None:
        """Create an empty store for the labels of this plan."""
        data = self.options.data
        create(path, self.header(), self.source.names, data.class_names, software(), False, data.targets)

    def part(self, rank: int) -> Path:
        """The store that one of several processes writes."""
        return self.options.out.with_name(f"{self.options.out.name}.rank{rank}")

    def merge_parts(self) -> None:
        """Copy the labels of all processes into one store, also those that a killed run left."""
        out = self.options.out
        for incomplete in beside(out, r"(\.rank\d+)?\.new"):  # a process was killed while it created the file
            incomplete.unlink()
        for part in parts_of(out):
            absorb(out, part)


def sha256_of_weights(model: nn.Module) -> str:
    """SHA-256 of the names, shapes, types and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
