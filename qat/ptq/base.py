"""What a calibration method is, and what methods share. Shapes: B images, S pixels, G groups, n values in a group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.progress import Progress
from qat.quantizers import Quantizer
from qat.sites.hooks import watching
from qat.sites.insert import WeightSite, quantizers, switched_off, weights

See = Callable[[str, Tensor], None]  # name of a site, its input as rows (G, n)


class PTQMethod(ABC):
    """Fills the parameters of every quantizer of a model; it changes values, never structure."""

    # False: every rank gets the same values. Annotated as ClassVar, it would end jsonargparse's checks of options
    single_device = True

    def __call__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate ``model`` on normalized images (B, 3, S, S) on its device; switches end as they were.

        When it is interrupted, what was not calibrated before is not calibrated after.
        """
        fresh = [quantizer for _, quantizer in quantizers(model) if not quantizer.calibrated]
        with undisturbed(model), torch.no_grad():
            try:
                self.calibrate(model, batches)
            except BaseException:
                for values in (values for q in fresh for values in (*q.parameters(), *q.buffers())):
                    values.fill_(torch.nan)
                raise

    @abstractmethod
    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """The same, for a model in evaluation mode, without gradients; switches may be left in any position."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; then modes, ``requires_grad`` and switches of quantizers are as before."""
    training = [(module, module.training) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    enabled = [(quantizer, quantizer.enabled) for _, quantizer in quantizers(model)]
    try:
        model.eval()
        yield
    finally:
        for module, before in training:
            module.training = before
        for parameter, before in learning:
            parameter.requires_grad_(before)
        for quantizer, before in enabled:
            quantizer.enabled = before


def uncalibrated(model: nn.Module) -> tuple[list[WeightSite], dict[str, Quantizer]]:
    """The weights that are to be calibrated, and the activation sites by name; what is calibrated stays as it is."""
    todo = {name: quantizer for name, quantizer in quantizers(model) if not quantizer.calibrated}
    return (
        [site for site in weights(model) if site.name in todo],
        {name: quantizer for name, quantizer in todo.items() if quantizer.layout.batched},
    )


def stream(
    model: nn.Module, batches: Iterable[Tensor], wanted: Mapping[str, Quantizer], see: See, shown: bool = True
) -> None:
    """Run the float model and hand over the input of every wanted site, batch after batch.

    Args:
        model: in evaluation mode; its quantizers are switched off meanwhile.
        batches: normalized images (B, 3, S, S); none is read when nothing is wanted.
        wanted: sites by name.
        see: is called with a name and the values (G, n), float32, which may be a view of the model's tensor.
        shown: whether progress is reported; only where the number of batches is known.

    Raises:
        QatError: a site that no image reaches.
    """
    if not wanted:
        return
    missing = dict.fromkeys(wanted)

    def hand_over(name: str, args: tuple[Tensor, ...]) -> None:
        missing.pop(name, None)
        see(name, wanted[name].grouped(args[0].float()))

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
