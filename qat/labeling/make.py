"""Making soft labels: a teacher over many crops of every image, in one process or many, that can be stopped and go on.

Images are cut into blocks, and the crops of a block into batches, by their place in the list alone. Every forward of
the teacher therefore has the same content whoever does it, and the labels are the same bits with any number of
processes and kills. Shapes: M crops of an image, b crops in a batch, S their side, k stored classes.
"""

from __future__ import annotations

import logging
import os
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
from qat.data.softlabels.blocks import Blocks, Piece, Source, images_of, images_per_block
from qat.data.softlabels.store import Row, open_store
from qat.data.softlabels.writer import Writer
from qat.errors import QatError, first_line
from qat.labeling.plan import SPLIT, Options, Plan, sha256_of_weights
from qat.models import default_preprocessing
from qat.progress import Progress
from qat.runs.process import first_process
from qat.training.teacher import Teacher, build_teacher

log = logging.getLogger(__name__)
PATIENCE = timedelta(days=30)  # of a process that is done, with those that are not


def make_softlabels(options: Options) -> None:
    """Label every image that has no labels yet; QatError for bad input, before the teacher has seen an image."""
    default_preprocessing(options.teacher)  # an unknown teacher, or a folder without images, before weights are read
    classes = class_names(options.data.root / SPLIT)
    precision = _precision(options)
    fabric = _fabric(options, precision)
    teacher = build_teacher(options.teacher, options.teacher_checkpoint, len(classes), classes, "teacher")
    plan = Plan(options, teacher.preprocessing, sha256_of_weights(teacher.model), precision)
    if first_process():
        plan.prepare()
    fabric.launch()
    try:
        fabric.barrier()
        _label_share(fabric, teacher, plan)
        fabric.barrier()
    except BaseException:
        for process in getattr(fabric.strategy.launcher, "procs", ()):  # of the other devices: what they have is kept
            process.terminate()
        raise
    if fabric.is_global_zero:
        plan.join()
        _report(plan)


def _precision(options: Options) -> str:
    on_gpu = options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if options.precision == "16-mixed" and not on_gpu:
        raise QatError("precision is 16-mixed, which needs a GPU: give 32-true or bf16-mixed")
    return options.precision or ("16-mixed" if on_gpu else "32-true")


def _fabric(options: Options, precision: str) -> Fabric:
    """QatError for devices that are not there; processes that are done wait for the others as long as it takes."""
    alone = options.num_nodes == 1 and str(options.devices) == "1"
    try:
        return Fabric(
            accelerator=options.accelerator,
            strategy="auto" if alone else DDPStrategy(process_group_backend="gloo", timeout=PATIENCE),
            devices=options.devices,
            num_nodes=options.num_nodes,
            precision=precision,  # type: ignore[arg-type]
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise QatError(f"accelerator {options.accelerator}, devices {options.devices}: {first_line(error)}") from None


def _label_share(fabric: Fabric, teacher: Teacher, plan: Plan) -> None:
    """What this process does: every n-th block in which an image has no labels."""
    options = plan.options
    with open_store(options.out) as file:
        missing = file["done"][:] == 0
    blocks = np.unique(np.flatnonzero(missing) // images_per_block(options.crops, options.batch_size)).tolist()
    mine = blocks[fabric.global_rank :: fabric.world_size]
    own = options.out if fabric.world_size == 1 else plan.part(fabric.global_rank)
    if own != options.out:
        plan.create(own)
    sizes = [len(images_of(block, len(plan.paths), options.crops, options.batch_size)) for block in mine]
    share = f" (process {fabric.global_rank + 1} of {fabric.world_size})" if fabric.world_size > 1 else ""
    pieces = iter(_loader(plan, mine, fabric.device.type == "cuda"))  # forks before the file is open and locked
    with (
        Writer(own, options.flush_seconds) as writer,
        Progress(f"images{share}", sum(sizes), fabric.is_global_zero) as progress,
    ):
        for source, labels in _labelled(fabric, teacher, plan, pieces):
            if missing[source.number]:
                _put(plan, source, labels, writer)
            progress.advance(1)


def _labelled(fabric: Fabric, teacher: Teacher, plan: Plan, pieces: Iterator[Piece]) -> Iterator[tuple[Source, Tensor]]:
    """Every image with its labels (M, 2, k): classes and probabilities, float32 on the CPU."""
    parent = os.getppid()
    incomplete: dict[int, list[Tensor]] = defaultdict(list)  # labels of blocks of which more is to come
    for piece, labels in _forward(fabric, teacher, plan, pieces):
        incomplete[piece.block].append(labels)
        if piece.sources:
            yield from zip(piece.sources, torch.cat(incomplete.pop(piece.block)).split(plan.options.crops), strict=True)
        if fabric.global_rank and os.getppid() != parent:
            raise QatError("the process that started this one has gone; labels made so far are kept")


def _forward(fabric: Fabric, teacher: Teacher, plan: Plan, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """Every piece with its labels (b, 2, k); on a GPU one late, so that it never waits for the host."""
    fabric.to_device(teacher)
    if fabric.device.type == "cuda":
        teacher.to(memory_format=torch.channels_last)
    waiting: tuple[Piece, Tensor, torch.cuda.Event | None] | None = None
    for piece in pieces:
        images = fabric.to_device(piece.images)
        if images.is_cuda:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), fabric.autocast():
            logits = teacher(images).float()
        probs, classes = (logits / plan.options.temperature).softmax(-1).topk(plan.options.topk)
        labels = torch.stack([classes.float(), probs], 1).to("cpu", non_blocking=True)
        before, waiting = waiting, (piece._replace(images=torch.empty(0)), labels, _event(images))
        if before is not None:
            yield _arrived(*before)
    if waiting is not None:
        yield _arrived(*waiting)


def _event(images: Tensor) -> torch.cuda.Event | None:
    """What comes after all that was asked of the GPU so far."""
    if not images.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _arrived(piece: Piece, labels: Tensor, event: torch.cuda.Event | None) -> tuple[Piece, Tensor]:
    if event is not None:
        event.synchronize()
    return piece, labels


def _loader(plan: Plan, todo: list[int], pin_memory: bool) -> DataLoader[Piece]:
    options = plan.options
    seen = plan.preprocessing
    blocks = Blocks(
        plan.folder, plan.paths, todo, options.law, options.crops, options.batch_size, seen.size, seen.interpolation,
        options.seed,
    )  # fmt: skip
    workers = min(cores(), 8) if options.workers is None else options.workers
    ahead = 1 if workers else None  # pieces are large
    return DataLoader(blocks, batch_size=None, num_workers=workers, prefetch_factor=ahead, pin_memory=pin_memory)


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
            f"the teacher's output for {plan.folder / plan.paths[source.number]} is not finite in {plan.precision}: "
            "begin another file with precision bf16-mixed or 32-true"
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
