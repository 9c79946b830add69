"""What a calibration method is, and what methods share. Shapes: B images, S pixels, G groups, n values in a group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.progress import Progress
from qat.quantizers import Quantizer
from qat.sites.hooks import watching
from qat.sites.insert import WeightSite, quantizers, switched_off, weights

Receive = Callable[[str, Tensor], None]  # name of a site, its input as rows (G, n)
SET = ("chosen", "report", "store", "cache")  # attributes of a method that are no options


class PTQMethod(ABC):
    """Fills the parameters of quantizers, and may improve a model that is calibrated.

    It changes values; where it puts another quantizer in place of one of the recipe, it says so in ``chosen``.

    Attributes:
        single_device: it runs on one device; False where every rank comes to the same values.
        changes_weights: it changes other parameters or buffers than those of quantizers too.
        needs_gradients: `calibrate` runs with gradients enabled.
        chosen: after a call, the specs, as plain data, that it has put in place of those of the recipe, by site; None
            for a site that it has left in floating point.
        report: after a call, what else there is to tell, as plain data.
        store: a `UnitStore`, from which a calibration that was killed goes on; None where nobody asks.
        cache: a `Cache`, which says where inputs and outputs of units are kept; None for memory.
    """

    # Without an annotation: as ClassVar, they would end jsonargparse's checks of the options of a subclass.
    single_device = True
    changes_weights = False
    needs_gradients = False
    chosen = cast(dict[str, dict[str, Any] | None], MappingProxyType({}))
    report = cast(dict[str, Any], MappingProxyType({}))
    store = cast(Any, None)
    cache = cast(Any, None)

    def __call__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate ``model``, in place, on normalized images (B, 3, S, S) on its device.

        Modes, ``requires_grad``, gradients and switches are put back. When it is interrupted, so are the values.
        """
        self.chosen, self.report = {}, {}
        with (
            undisturbed(model),
            sites_restored_on_error(model),
            values_restored_on_error(model, self.changes_weights),
            torch.set_grad_enabled(self.needs_gradients),
        ):
            self.calibrate(model, batches)

    def __repr__(self) -> str:
        """The name and the options, which tell a calibration that goes on whether it is the same one."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in SET}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"

    @abstractmethod
    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Do the work of a call, on a model in evaluation mode; switches may be left in any position."""

    def wants(self, model: nn.Module) -> bool:
        """Whether there is something to do; by default, while a quantizer is not calibrated."""
        return any(not quantizer.calibrated for _, quantizer in quantizers(model))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with no ``grad``, inside the block; put back modes, ``requires_grad``, ``grad`` and switches."""
    training = [(name, module.training) for name, module in model.named_modules()]  # by name: sites may be replaced
    learning = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    enabled = {name: quantizer.enabled for name, quantizer in quantizers(model)}
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
        yield
    finally:
        for name, before in training:
            model.get_submodule(name).training = before
        for name, parameter in model.named_parameters():
            required, parameter.grad = learning.get(name, (True, None))
            parameter.requires_grad_(required)
        for name, quantizer in quantizers(model):
            quantizer.enabled = enabled[name]


@contextmanager
def sites_restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put back, when the block fails, the quantizers themselves."""
    before = dict(quantizers(model))
    try:
        yield
    except BaseException:
        for name, quantizer in before.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantizer)
        raise


@contextmanager
def values_restored_on_error(model: nn.Module, weights: bool) -> Iterator[None]:
    """Put back, when the block fails, the values of all quantizers; with ``weights``, of the whole model.

    The copies are on the device of the model: with ``weights``, it needs the memory of its weights once more.
    """
    holders = [model] if weights else [quantizer for _, quantizer in quantizers(model)]
    tensors = [tensor for holder in holders for tensor in (*holder.parameters(), *holder.buffers())]
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, copied in zip(tensors, copies, strict=True):
                tensor.copy_(copied)
        raise


def uncalibrated(model: nn.Module) -> tuple[list[WeightSite], dict[str, Quantizer]]:
    """The weights, and by name the activation sites, that are not calibrated yet."""
    todo = {name: quantizer for name, quantizer in quantizers(model) if not quantizer.calibrated}
    return (
        [site for site in weights(model) if site.name in todo],
        {name: quantizer for name, quantizer in todo.items() if quantizer.layout.batched},
    )


@torch.no_grad()
def stream(
    model: nn.Module, batches: Iterable[Tensor], wanted: Mapping[str, Quantizer], receive: Receive, shown: bool = True
) -> None:
    """Run the float model, without gradients, and hand over the input of every wanted site, batch after batch.

    Args:
        model: in evaluation mode; its quantizers are switched off meanwhile.
        batches: normalized images (B, 3, S, S); none is read when nothing is wanted.
        wanted: sites by name.
        receive: is called with a name and the values (G, n), float32, which may be a view of the model's tensor.
        shown: whether progress is reported; it is reported only where the number of batches is known.

    Raises:
        QatError: no image reaches a wanted site.
    """
    if not wanted:
        return
    missing = dict.fromkeys(wanted)

    def hand_over(name: str, args: tuple[Tensor, ...]) -> None:
        missing.pop(name, None)
        receive(name, wanted[name].grouped(args[0].float()))

    total = len(batches) if isinstance(batches, Sized) else 0
    with (
        switched_off(quantizer for _, quantizer in quantizers(model)),
        watching(wanted, before=hand_over),
        Progress("calibration batches", total, shown and total > 0) as progress,
    ):
        for images in batches:
            model(images)
            progress.advance(1)
    for name in missing:
        raise QatError(f"no calibration image reached {name!r}: raise calibration.images")


def raise_unless_calibrated(name: str, quantizer: Quantizer) -> None:
    """Raise QatError when calibration has left a parameter that is not finite."""
    if not quantizer.calibrated:
        raise QatError(
            f"calibration of {name!r} ({quantizer.spec}) gave a step that is not finite, so its tensor holds NaN or "
            "infinity: check the float model's checkpoint and the images"
        )
