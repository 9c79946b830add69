"""Making soft labels: a teacher labels many crops of every image, in one process or in several; a stopped run resumes.

Images are cut into blocks, and the crops of a block into batches, by their place in the list alone. Every forward
pass of the teacher therefore has the same content in whichever process it runs, and the labels are equal to the bit for
any number of processes and kills. Shapes: M crops of an image, b crops in a batch, S their side, k stored classes.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from qat.data.check import cores
from qat.data.softlabels.locking import only_maker
from qat.data.softlabels.opening import open_store
from qat.data.softlabels.store import ImageLabels
from qat.data.softlabels.teacher_batches import (
    CroppedImage,
    TeacherBatch,
    TeacherBatches,
    images_of_block,
    images_per_block,
)
from qat.data.softlabels.writer import Writer
from qat.data.worker import leave_signals_to_the_main_process, let_other_threads_finish, signals_held_back
from qat.errors import QatError, first_line
from qat.labeling.plan import Options, Plan, sha256_of_weights
from qat.labeling.processes import Processes
from qat.labeling.report import Report, how_far
from qat.models import default_preprocessing
from qat.progress import Progress
from qat.runs.process import first_process
from qat.runs.stop import Stopped, defer, deferred
from qat.training.teacher import Teacher, build_teacher

log = logging.getLogger(__name__)
PATIENCE = timedelta(days=30)  # how long a process that has finished waits for the others


def make_softlabels(options: Options) -> None:
    """Label every image that has no labels yet.

    Raises:
        QatError: bad input, found before the teacher sees an image, or an image or a label that cannot be used.
    """
    default_preprocessing(options.teacher)  # finds an unknown teacher before its weights are read
    classes = options.data.class_names
    precision = _precision(options)
    fabric = _fabric(options, precision)
    with only_maker(options.out) if first_process() else nullcontext():
        teacher = build_teacher(options.teacher, options.teacher_checkpoint, len(classes), classes, "teacher")
        plan = Plan(options, teacher.preprocessing, sha256_of_weights(teacher.model), precision, fabric.world_size)
        if first_process():
            plan.prepare()
        with deferred():
            defer()
            fabric.launch()
            _make(Processes(fabric), fabric, teacher, plan)


def _make(processes: Processes, fabric: Fabric, teacher: Teacher, plan: Plan) -> None:
    """Label the images in all processes, and bring their labels together; where one fails, all end."""
    try:
        processes.wait_for_all()
        report = Report(plan.options.out, plan.options.data.root)
        _label_share(fabric, teacher, plan, processes)
        processes.wait_for_all()
        if fabric.is_global_zero:
            plan.merge_parts()
            report.end()
    except Stopped as stopped:
        processes.end()
        raise Stopped(stopped.signum, how_far(plan.options.out)) from None
    except BaseException:
        processes.end()
        raise


def _precision(options: Options) -> str:
    """The precision of the teacher; QatError for one that the device lacks."""
    on_gpu = options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if options.precision == "16-mixed" and not on_gpu:
        raise QatError("precision is 16-mixed, which needs a GPU: give 32-true or bf16-mixed")
    return options.precision or ("16-mixed" if on_gpu else "32-true")


def _fabric(options: Options, precision: str) -> Fabric:
    """One process per device; QatError for devices that do not exist."""
    alone = options.num_nodes == 1 and str(options.devices) == "1"
    try:
        fabric = Fabric(
            accelerator=options.accelerator,
            strategy="auto" if alone else DDPStrategy(process_group_backend="gloo", timeout=PATIENCE),
            devices=options.devices,
            num_nodes=options.num_nodes,
            precision=precision,  # type: ignore[arg-type]
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise QatError(f"accelerator {options.accelerator}, devices {options.devices}: {first_line(error)}") from None
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) not in (1, fabric.world_size):
        raise QatError(
            f"devices is {options.devices} and num_nodes {options.num_nodes}, but {started} processes were started: "
            "give the devices of each node and the number of nodes that they were started on"
        )
    return fabric


def _label_share(fabric: Fabric, teacher: Teacher, plan: Plan, processes: Processes) -> None:
    """Label the share of this process: every n-th of the blocks in which an image has no labels."""
    options = plan.options
    with open_store(options.out) as file:
        missing = file["done"][:] == 0
    blocks = np.unique(np.flatnonzero(missing) // images_per_block(options.crops, options.batch_size)).tolist()
    mine = blocks[fabric.global_rank :: fabric.world_size]
    own = options.out if fabric.world_size == 1 else plan.part(fabric.global_rank)
    if own != options.out:
        plan.create(own)
    sizes = [len(images_of_block(block, len(plan.source), options.crops, options.batch_size)) for block in mine]
    share = f" (process {fabric.global_rank + 1} of {fabric.world_size})" if fabric.world_size > 1 else ""
    loader = _loader(plan, mine, fabric.device.type == "cuda")
    let_other_threads_finish()
    with signals_held_back():
        batches = iter(loader)  # forks before the file is open and locked
    with (
        Writer(own, options.flush_seconds) as writer,
        Progress(f"images{share}", sum(sizes), fabric.is_global_zero) as progress,
    ):
        for image, labels in _labeled(fabric, teacher, plan, batches, processes):
            if missing[image.number]:
                _put(plan, image, labels, writer)
            progress.advance(1)


def _labeled(
    fabric: Fabric, teacher: Teacher, plan: Plan, batches: Iterator[TeacherBatch], processes: Processes
) -> Iterator[tuple[CroppedImage, Tensor]]:
    """Yield every image with its labels (M, 2, k): classes and probabilities, float32 on the CPU.

    Raises:
        Stopped: this process was told to end; like `QatError` for another process that has ended, after every batch.
    """
    incomplete: dict[int, list[Tensor]] = defaultdict(list)  # labels of blocks whose last batch is still to come
    for batch, labels in _forward(fabric, teacher, plan, batches):
        incomplete[batch.block].append(labels)
        if batch.images:
            yield from zip(batch.images, torch.cat(incomplete.pop(batch.block)).split(plan.options.crops), strict=True)
        processes.check()


def _forward(
    fabric: Fabric, teacher: Teacher, plan: Plan, batches: Iterator[TeacherBatch]
) -> Iterator[tuple[TeacherBatch, Tensor]]:
    """Yield every batch with its labels (b, 2, k); on a GPU one batch late, so that it never waits for the host."""
    fabric.to_device(teacher)
    if fabric.device.type == "cuda":
        teacher.to(memory_format=torch.channels_last)
    waiting: tuple[TeacherBatch, Tensor, torch.cuda.Event | None] | None = None
    for batch in batches:
        crops = fabric.to_device(batch.crops)
        if crops.is_cuda:
            crops = crops.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), fabric.autocast():
            logits = teacher(crops).float()
        probs, classes = (logits / plan.options.temperature).softmax(-1).topk(plan.options.topk)
        labels = torch.stack([classes.float(), probs], 1).to("cpu", non_blocking=True)
        before, waiting = waiting, (batch._replace(crops=torch.empty(0)), labels, _event(crops))
        if before is not None:
            yield _arrived(*before)
    if waiting is not None:
        yield _arrived(*waiting)


def _event(crops: Tensor) -> torch.cuda.Event | None:
    """An event that happens when the GPU has finished everything it was asked for so far; None on other devices."""
    if not crops.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _arrived(batch: TeacherBatch, labels: Tensor, event: torch.cuda.Event | None) -> tuple[TeacherBatch, Tensor]:
    """The batch and its labels, once the copy of the labels to the CPU is complete."""
    if event is not None:
        event.synchronize()
    return batch, labels


def _loader(plan: Plan, todo: list[int], pin_memory: bool) -> DataLoader[TeacherBatch]:
    options = plan.options
    seen = plan.preprocessing
    batches = TeacherBatches(
        plan.source, todo, options.crop_distribution, options.crops, options.batch_size, seen.size,
        seen.interpolation, options.seed,
    )  # fmt: skip
    workers = min(cores(), 8) if options.workers is None else options.workers
    ahead = 1 if workers else None  # batches are large
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_main_process,
    )


def _put(plan: Plan, image: CroppedImage, labels: Tensor, writer: Writer) -> None:
    """Hand the labels (M, 2, k) of one image to the writer; QatError if the image or a label cannot be used."""
    if image.bad:
        if plan.options.on_bad_image == "error":
            raise QatError(f"cannot read {image.bad}; repair it, or set on_bad_image skip; labels made so far are kept")
        log.warning("no labels for %s", image.bad)
        return
    if not torch.isfinite(labels).all():
        way_out = "begin another file with precision bf16-mixed or 32-true"
        if plan.precision == "32-true":
            way_out = "check its weights, and whether the temperature is too small"
        raise QatError(
            f"the teacher's output for {plan.source.path(image.number)} is not finite in {plan.precision}: {way_out}"
        )
    classes, probs = labels.unbind(1)
    writer.put(
        image.number,
        ImageLabels(
            image.boxes.numpy().astype(np.uint16),
            image.flips.numpy(),
            classes.numpy().astype(np.uint16),
            probs.numpy().astype(np.float16),
            image.image_size,
        ),
    )
