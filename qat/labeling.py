"""Making soft labels: a teacher over many crops of every image, in one process or many, that can be stopped and go on.

Images are cut into blocks, and the crops of a block into batches, by their place in the list alone. Every forward of
the teacher therefore has the same content whoever does it, and the labels are the same bits with any number of
processes and kills. Shapes: M crops of an image, b crops in a batch, S their side, k stored classes.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from qat.data.check import cores
from qat.data.folder import class_names
from qat.data.labelblocks import Blocks, Piece, Source, images_of, images_per_block
from qat.data.labelwriter import Writer
from qat.data.softlabels import Row, open_store
from qat.errors import QatError
from qat.labelplan import Options, Plan, sha256_of_weights
from qat.models import default_preprocessing
from qat.progress import Progress
from qat.runs import first_process
from qat.teacher import Teacher, build_teacher

log = logging.getLogger(__name__)
PATIENCE = timedelta(days=30)  # of a process that is done, with those that are not


def make_softlabels(options: Options) -> None:
    """Label every image that has no labels yet; QatError for bad input, before the teacher has seen an image."""
    default_preprocessing(options.teacher)  # an unknown teacher, or a folder without images, before weights are read
    classes = class_names(options.data.root / "train")
    teacher = build_teacher(options.teacher, options.teacher_checkpoint, len(classes), classes, "teacher")
    precision = options.precision or ("16-mixed" if _on_gpu(options) else "32-true")
    plan = Plan(options, teacher.preprocessing, sha256_of_weights(teacher.model), precision)
    if first_process():
        plan.prepare()
    fabric = Fabric(
        accelerator=options.accelerator,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=PATIENCE) if _processes(options) > 1 else "auto",
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    fabric.barrier()
    todo = _unfinished(plan)[fabric.global_rank :: fabric.world_size]
    own = plan.part(fabric.global_rank) if fabric.world_size > 1 else options.out
    if own != options.out:
        plan.create(own)
    with Writer(own, options.flush_seconds) as writer:
        _label(fabric, teacher, plan, todo, writer)
    fabric.barrier()
    if fabric.is_global_zero:
        plan.join()
        _report(plan)


def _on_gpu(options: Options) -> bool:
    return options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _processes(options: Options) -> int:
    devices = options.devices
    if devices in ("auto", -1, "-1"):
        devices = torch.cuda.device_count() if _on_gpu(options) else 1
    return int(devices) * options.num_nodes


def _unfinished(plan: Plan) -> list[int]:
    """Numbers of the blocks in which an image has no labels."""
    options = plan.options
    with open_store(options.out) as file:
        missing = np.flatnonzero(file["done"][:] == 0)
    blocks: list[int] = np.unique(missing // images_per_block(options.crops, options.batch_size)).tolist()
    return blocks


def _label(fabric: Fabric, teacher: Teacher, plan: Plan, todo: list[int], writer: Writer) -> None:
    """The share of this process."""
    options, count = plan.options, len(plan.paths)
    sizes = [len(images_of(block, count, options.crops, options.batch_size)) for block in todo]
    fabric.to_device(teacher)
    if fabric.device.type == "cuda":
        teacher.to(memory_format=torch.channels_last)
    unknown: dict[int, list[Tensor]] = defaultdict(list)  # the labels of blocks that are not complete yet
    share = f" (process {fabric.global_rank + 1} of {fabric.world_size})" if fabric.world_size > 1 else ""
    with Progress(f"images{share}", sum(sizes), fabric.is_global_zero) as progress:
        for piece, labels in _labelled(fabric, teacher, plan, todo):
            unknown[piece.block].append(labels)
            if piece.sources:
                rows = torch.cat(unknown.pop(piece.block)).split(options.crops)
                for source, row in zip(piece.sources, rows, strict=True):
                    _put(plan, source, row, writer)
                progress.advance(len(rows))


def _labelled(fabric: Fabric, teacher: Teacher, plan: Plan, todo: list[int]) -> Iterator[tuple[Piece, Tensor]]:
    """Every piece with its labels (b, 2, k): classes and probabilities, float32 on the CPU.

    A piece is handed on when the next one is on its way, so that a GPU never waits for the host.
    """
    waiting: tuple[Piece, Tensor] | None = None
    for piece in _loader(plan, todo, fabric.device.type == "cuda"):
        images = fabric.to_device(piece.images)
        if images.is_cuda:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), fabric.autocast():
            logits = teacher(images).float()
        probs, classes = (logits / plan.options.temperature).softmax(-1).topk(plan.options.topk)
        labels = torch.stack([classes.float(), probs], 1)
        if waiting is not None:
            yield waiting[0], waiting[1].cpu()
        waiting = piece._replace(images=piece.images[:0]), labels
    if waiting is not None:
        yield waiting[0], waiting[1].cpu()


def _loader(plan: Plan, todo: list[int], pin_memory: bool) -> DataLoader[Piece]:
    options = plan.options
    seen = plan.preprocessing
    blocks = Blocks(
        plan.folder, plan.paths, todo, options.law, options.crops, options.batch_size, seen.size, seen.interpolation,
        options.seed,
    )  # fmt: skip
    workers = min(cores(), 8) if options.workers is None else options.workers
    return DataLoader(blocks, batch_size=None, num_workers=workers, pin_memory=pin_memory)


def _put(plan: Plan, source: Source, labels: Tensor, writer: Writer) -> None:
    """Hand the labels (M, 2, k) of one image to the writer; QatError for what no label may be."""
    if source.bad:
        if plan.options.on_bad_image == "error":
            raise QatError(
                f"cannot read {source.bad}; repair it, or set on_bad_image skip; labels made so far are kept"
            )
        log.warning("no labels for %s", source.bad)
        return
    if not torch.isfinite(labels).all():
        raise QatError(
            f"the teacher's output for {plan.folder / plan.paths[source.number]} is not finite: set precision 32-true"
        )
    classes, probs = labels.unbind(1)
    writer.put(
        source.number,
        Row(
            source.boxes.numpy().astype(np.uint16),
            source.flips.numpy(),
            classes.numpy().astype(np.uint16),
            probs.numpy().astype(np.float16),
            source.image_size,
        ),
    )


def _report(plan: Plan) -> None:
    with open_store(plan.options.out) as file:
        done = int(file["done"][:].sum())
    size = plan.options.out.stat().st_size
    log.info("%s: %d of %d images have labels, %.1f MB", plan.options.out, done, len(plan.paths), size / 1e6)
    if done < len(plan.paths):
        log.warning("%d images have none: repair them and run again, or train with data.softlabels_partial true",
                    len(plan.paths) - done)  # fmt: skip
