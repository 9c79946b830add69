"""Distillation of features: modules of the student give what the same modules of the teacher give.

The loss of one module is its squared error over the variance of the teacher's output, so that modules of any scale
count alike, and 1 is as good as a constant. Shapes: B crops, C channels, in the last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq.rotate_residual import REPORT, rotate_residual
from qat.ranges import Range, check_fields
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, switched_off

TINY = 1e-12  # of a variance: a module of the teacher that gives a constant


@dataclass(frozen=True)
class FeatureOptions:
    """Which outputs are compared.

    Args:
        modules: dotted names in the student, for example [blocks.3, blocks.7, blocks.11].
        teacher_modules: the same in the teacher, one for each; null for the same names.
        weight: of the mean over all modules, beside the loss on labels.
    """

    modules: Sequence[str] = ()
    teacher_modules: Sequence[str] | None = None
    weight: Annotated[float, Range(above=0, high=1e30)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "model.features.")
        if not self.modules:
            raise QatError("model.features.modules is empty: give names of modules, such as [blocks.3, blocks.11]")
        if self.teacher_modules is not None and len(self.teacher_modules) != len(self.modules):
            raise QatError(
                f"model.features.teacher_modules has {len(self.teacher_modules)} names, and modules "
                f"{len(self.modules)}: give one for each, in the same order"
            )


class FeatureLoss:
    """The loss, from what is seen while both models run; nothing without options.

    Args:
        options: which modules.
        student, teacher: models that have them; QatError, with the nearest name, where one is missing.
    """

    def __init__(self, options: FeatureOptions | None, student: nn.Module, teacher: nn.Module | None) -> None:
        self.weight, self.student, self.teacher = 0.0, dict[str, nn.Module](), dict[str, nn.Module]()
        names: Sequence[str] = ()
        if options is not None:
            if teacher is None:
                raise QatError("model.features needs a teacher that sees the same crops: give model.teacher")
            self.weight = options.weight
            self.student = modules_of(student, options.modules, "model.features.modules")
            names = options.modules if options.teacher_modules is None else options.teacher_modules
            self.teacher = modules_of(teacher, names, "model.features.teacher_modules")
        self.pairs = list(zip(options.modules, names, strict=True)) if options is not None else []
        self._rotated = False
        self._seen: dict[str, Tensor] = {}  # of the student
        self._wanted: dict[str, Tensor] = {}  # of the teacher

    def follow(self, calibration: Mapping[str, Any], teacher: nn.Module) -> None:
        """Rotate the residual stream of the teacher where a calibration has rotated that of the student.

        Args:
            calibration: what it has told.
            teacher: computes the same as before.

        Raises:
            QatError: this teacher cannot be rotated.
        """
        seed = calibration.get("report", {}).get(REPORT)
        if seed is None or not self.pairs or self._rotated:
            return
        why = "model.features: the calibration has rotated the residual stream of the student, and that of the teacher"
        if any(quantizers(teacher)):
            raise QatError(f"{why} is quantized: take a teacher in floating point, or calibrate without RotateResidual")
        try:
            rotate_residual(teacher, seed)
        except QatError as error:
            raise QatError(f"{why} cannot follow: {error}; leave model.features out") from None
        self._rotated = True

    @torch.no_grad()
    def check(self, student: Callable[[Tensor], Tensor], teacher: Callable[[Tensor], Tensor], size: int) -> None:
        """Run both models, in evaluation mode, on one image of zeros; QatError as in `take`."""
        image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        with self.watching_student(), self.watching_teacher():
            teacher(image)
            student(image)
        self.take()

    def watching_student(self) -> AbstractContextManager[None]:
        """Keep what its modules give inside the block."""
        return watching(self.student, after=lambda name, args, out: self._seen.update({name: out}))

    def watching_teacher(self) -> AbstractContextManager[None]:
        """Keep what its modules give inside the block."""
        return watching(self.teacher, after=lambda name, args, out: self._wanted.update({name: out.detach()}))

    def take(self) -> dict[str, Tensor]:
        """The weighted loss of what was seen last, which is then forgotten, by its name; empty without options.

        Raises:
            QatError: a module has not run, or gives the teacher another shape.
        """
        parts = []
        for name, other in self.pairs:
            mine, target = self._seen.get(name), self._wanted.get(other)
            if mine is None or target is None:
                where = f"{name!r} has not run in the student" if mine is None else f"{other!r} not in the teacher"
                raise QatError(f"model.features: {where}: choose modules that every forward runs")
            if mine.shape != target.shape:
                raise QatError(
                    f"model.features: {name!r} gives {tuple(mine.shape)} and {other!r} of the teacher "
                    f"{tuple(target.shape)}: choose modules, or a teacher, of the same size"
                )
            parts.append(relative_error(mine.float(), target.float()))
        self._seen.clear()
        self._wanted.clear()
        return {"features": self.weight * torch.stack(parts).mean()} if parts else {}


@contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """A quantized model in evaluation mode and in floating point inside the block."""
    mode = model.training
    model.eval()
    with switched_off(quantizer for _, quantizer in quantizers(model)):
        yield
    model.train(mode)


def relative_error(x: Tensor, target: Tensor) -> Tensor:
    """The squared error over the variance of the target (B, ..., C) around the mean of each channel."""
    spread = target - target.flatten(0, -2).mean(0)
    return (x - target).square().mean() / spread.square().mean().clamp(min=TINY)


def modules_of(model: nn.Module, names: Sequence[str], option: str) -> dict[str, nn.Module]:
    """Modules by name; QatError where one is missing."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise QatError(f"{option}: there is no module {name!r}; the nearest is {near[0]!r}")
    return {name: known[name] for name in names}
