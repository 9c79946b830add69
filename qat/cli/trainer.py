"""Lightning's Trainer with what the verbs of `qat` add: a table, a results file, a file of predictions."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from qat.callbacks import Calibrate, IntegerProducts, RecordSites, WritePredictions
from qat.cli.check_paths import check_folder
from qat.cli.summary import after_validation, show
from qat.errors import QatError
from qat.runs.folder import CALIBRATED
from qat.runs.writing import replacing
from qat.sites.describe import cost, summary
from qat.training.module import QATModule

log = logging.getLogger(__name__)
TRAINER_DEFAULTS = {
    "reload_dataloaders_every_n_epochs": 1,  # passes differ in crops per image
    "use_distributed_sampler": False,  # the data module spreads the images itself
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # `qat describe` says more
}
RESULTS = "results.json"  # of a run that calibrates
C = TypeVar("C", bound=Callback)


class Trainer(L.Trainer):
    """Options of Lightning's Trainer, and one of ours.

    Args:
        float32_matmul_precision: how a GPU multiplies float32 matrices. highest keeps float32; high rounds operands to
            TensorFloat-32 and is several times faster on Tensor Cores; medium rounds them to bfloat16. Null leaves
            what torch is set to, which is highest by default.
        **kwargs: arguments of Lightning's Trainer.
    """

    def __init__(
        self, float32_matmul_precision: Literal["highest", "high", "medium"] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if float32_matmul_precision is not None:
            torch.set_float32_matmul_precision(float32_matmul_precision)
        elif _has_idle_tensor_cores(self.strategy.root_device):
            log.info(
                "float32 matrices are multiplied without Tensor Cores: --trainer.float32_matmul_precision high is "
                "several times faster, and rounds operands to TensorFloat-32"
            )

    def validate(  # type: ignore[override]
        self, model: QATModule, datamodule: Any = None, ckpt_path: Path | None = None, results_file: Path | None = None
    ) -> Mapping[str, Any]:
        """Evaluate a model, or a checkpoint, on the validation images.

        Args:
            model: what to evaluate.
            datamodule: where the images come from.
            ckpt_path: checkpoint to restore first.
            results_file: JSON file to write: top1 and top5 in percent, loss, images, seconds, model, recipe, size_mb,
                and calibration, where there was one. A run that calibrates writes it to its folder in any case.
        """
        check_folder("--results_file", results_file)
        results = self._evaluate(model, datamodule, ckpt_path)
        if self.is_global_zero:
            calibrated = next((folder / CALIBRATED for folder in self._calibration_folders()), None)
            show(*after_validation(results, ckpt_path, calibrated))
        self._write(results, results_file)
        return results

    def calibrate(
        self, model: QATModule, datamodule: Any = None, results_file: Path | None = None
    ) -> Mapping[str, Any]:
        """Calibrate a model, and evaluate it on the validation images unless ``limit_val_batches`` is 0.

        Calibration is the work of the callback `Calibrate`, in the setup of an evaluation.

        Args:
            model: what to calibrate.
            datamodule: where the images come from.
            results_file: as of `validate`; top1, top5, loss, images and seconds are there after an evaluation only.
        """
        check_folder("--results_file", results_file)
        results = self._evaluate(model, datamodule, None)
        if "top1" not in results:  # no evaluation has started, which writes the table
            for callback in self._of(RecordSites):
                callback.on_fit_start(self, model)
        self._write(results, results_file)
        return results

    def _evaluate(self, model: QATModule, datamodule: Any, ckpt_path: Path | None) -> dict[str, Any]:
        """Run all that the callbacks do, and the evaluation if there is one; return what is known then."""
        started, results = time.perf_counter(), dict[str, Any]()
        for metrics in super().validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False):
            _raise_unless_finite(metrics["val/loss"], model)
            seconds = time.perf_counter() - started - sum(callback.seconds for callback in self._of(Calibrate))
            results = {key: metrics[f"val/{key}"] for key in ("top1", "top5", "loss")}
            results |= {"images": round(metrics["val/images"]), "seconds": round(seconds, 2)}
        for callback in self._of(IntegerProducts):
            results["products"] = callback.found  # the accuracy is that of integers
        return results | _about(model)

    def _write(self, results: Mapping[str, Any], results_file: Path | None) -> None:
        """Write results to the folder of a calibration, and to a file of the user's."""
        files = [*(folder / RESULTS for folder in self._calibration_folders()), results_file]
        for file in files if self.is_global_zero else []:
            if file is not None:
                with replacing(file) as opened:
                    opened.write(json.dumps(results, indent=2) + "\n")

    def _calibration_folders(self) -> list[Path]:
        return [callback.folder for callback in self._of(Calibrate) if callback.folder is not None]

    def _of(self, kind: type[C]) -> list[C]:
        """The callbacks of a class."""
        return [callback for callback in self.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]

    def predict(  # type: ignore[override]
        self, model: QATModule, datamodule: Any = None, ckpt_path: Path | None = None, output: Path | None = None
    ) -> None:
        """Write the five most probable classes of every image to a CSV file.

        Args:
            model: what predicts.
            datamodule: where the images come from.
            ckpt_path: checkpoint to restore first.
            output: CSV file to write: path, then class and probability, most probable first.
        """
        if output is None:
            raise QatError("qat predict writes a table: give --output predictions.csv")
        check_folder("--output", output)
        table = WritePredictions(output, model.card.classes)
        self.callbacks.append(table)  # type: ignore[attr-defined]
        super().predict(model, datamodule=datamodule, ckpt_path=ckpt_path, return_predictions=False)
        show(f"predictions of {table.images} images: {output}")


def _has_idle_tensor_cores(device: torch.device) -> bool:
    """Whether a GPU has Tensor Cores that float32 products leave idle."""
    if device.type != "cuda" or torch.get_float32_matmul_precision() != "highest":
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8  # Ampere


def _raise_unless_finite(loss: float, model: QATModule) -> None:
    """Raise QatError, with its cause, for a loss that is no number: accuracies beside it mean nothing."""
    if math.isfinite(loss):
        return
    broken = next((name for name, value in model.model.state_dict().items() if not torch.isfinite(value).all()), None)
    cause = f"{broken} has values that are not finite" if broken else "activations overflow"
    raise QatError(f"the validation loss is {loss}: {cause}; give another checkpoint, or another trainer.precision")


def _about(model: QATModule) -> dict[str, Any]:
    """What results say of the model itself."""
    size = cost(model.model, model.preprocessing.size)
    return {
        "model": model.card.arch,
        "recipe": summary(model.model),
        "size_mb": round(size.size_mb, 3),
        "float_size_mb": round(size.float_size_mb, 3),
        "calibration": model.calibration,
    }
