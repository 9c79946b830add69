"""`qat fit | validate | predict`: LightningCLI over our module, our data module and our trainer."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from qat import checkpoint
from qat.callbacks import (
    Calibrate,
    ConsoleLog,
    EndTogether,
    GradientRatio,
    PlaceModule,
    ProgressBar,
    RecordSites,
    SaveLast,
)
from qat.cli.agreement import changes, run_options
from qat.cli.check_trainer import check_trainer
from qat.cli.configs import given_configs, read_old_class_paths, with_bases
from qat.cli.options import add_options
from qat.cli.settle import settle
from qat.cli.trainer import Trainer
from qat.data.imagenet import ImageNetDataModule
from qat.errors import QatError
from qat.runs.folder import LAST, AtomicCheckpoints, config_name, fresh_folder, last_folder
from qat.runs.metrics import MetricsFile
from qat.runs.process import first_process
from qat.training.module import QATModule

log = logging.getLogger(__name__)
TRAINER_DEFAULTS = {
    "reload_dataloaders_every_n_epochs": 1,  # passes differ in crops per image
    "use_distributed_sampler": False,  # the data module spreads the images itself
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # `qat describe` says more
}
NOT_OPTIONS = {  # arguments of the trainer's verbs that the command line gives itself
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
    "validate": {"model", "datamodule", "ckpt_path", "results_file"},
    "predict": {"model", "datamodule", "ckpt_path", "output"},
}
TRAINER_HELP = "--trainer.help"
UNUSED = ".*callbacks used to create the checkpoint.*"  # evaluation needs none of them


class QatCLI(LightningCLI):
    """One verb: its parser, its checks, and what it builds: ``model``, ``datamodule`` and ``trainer``."""

    def __init__(self, verb: str, arguments: Sequence[str]) -> None:
        self.verb = verb
        self.configs = given_configs(arguments)
        self.trainer: Trainer
        self._folder: Path | None = None
        try:
            self._build_and_run(arguments)
        except BaseException:
            self._remove_empty_folder()
            raise

    def _build_and_run(self, arguments: Sequence[str]) -> None:
        super().__init__(
            QATModule,
            ImageNetDataModule,
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"prog": "qat", "exit_on_error": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # our checkpoints describe themselves
            args=[self.verb, *with_bases(arguments)],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb alone: parsers of the others would take their time."""
        return {self.verb: NOT_OPTIONS[self.verb]}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """None beside ours."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The trainer's; model and data have options of their own."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Everything else."""
        add_options(parser, self.verb)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and keep apart what was really given: a checkpoint must not be contradicted."""
        self.config = parser.parse_args(args)
        self.given = parser.parse_args(args, defaults=False)

    def before_instantiate_classes(self) -> None:
        """Find the run folder of a resumed run, then settle everything before a model is built or downloaded."""
        config = self.config[self.verb]
        config.base = None  # its content is in the config by now
        check_trainer(config.trainer)
        self.resumed = self.verb == "fit" and str(config.ckpt) == "last"
        if self.verb == "fit" and config.ckpt is not None and not self.configs:
            raise QatError("qat fit --ckpt resumes a run: give its --config too, for the data, teacher and schedule")
        ckpt = self._run_folder() / LAST if self.resumed else config.ckpt
        settled = settle(self.verb, config, self.given[self.verb], ckpt)
        self.ckpt, self.calibrates = settled.ckpt, settled.calibrates

    def instantiate_classes(self) -> None:
        """Build the data module, the trainer and the model from their options."""
        self.config_init = self.parser.instantiate(self.config)
        options = self.config_init[self.verb]
        self.datamodule = ImageNetDataModule(options.data)
        self.trainer = self.instantiate_trainer()  # what is wrong with it shows before weights are read or downloaded
        self.model = QATModule(options.model)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the callbacks and the run folder of a training run, or of a calibration."""
        options = self.config_init[self.verb]
        config = options.trainer
        bar = sys.stdout.isatty() and config.enable_progress_bar is not False
        callbacks = [*(config.callbacks or []), ProgressBar() if bar else ConsoleLog()]
        if self.verb == "fit" or self.calibrates:
            kwargs["default_root_dir"] = run = self._run_folder()
            kwargs["plugins"] = [*(config.plugins or []), AtomicCheckpoints()]
        if self.verb == "fit":
            callbacks += self._recorders(run, callbacks)
            self.save_config_kwargs = {"config_filename": config_name(run)}
            kwargs["max_epochs"] = len(self.datamodule.passes) if config.max_epochs is None else config.max_epochs
            if config.logger in (None, True):
                kwargs["logger"] = MetricsFile(run)
        else:
            self.save_config_callback = None
            kwargs |= {"logger": False, "enable_checkpointing": False}
            callbacks += [RecordSites(self._folder)] if self._folder else []
        kwargs["enable_progress_bar"] = bar
        if self._runs_on_one_device():
            kwargs["devices"] = 1
        calibrate = [Calibrate(options.calibration, self._folder)] if self.calibrates else []
        callbacks = self._ordered([EndTogether(), PlaceModule(), *calibrate, *callbacks])
        try:
            trainer: Any = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise QatError(f"trainer: {error}") from error
        if self.verb == "fit":
            accumulate = self.datamodule.plan_batches(trainer.world_size, config.accumulate_grad_batches)
            trainer.accumulate_grad_batches = accumulate
        for callback in calibrate:
            callback.check_devices(trainer.world_size, trains=self.verb == "fit")
        return trainer

    def _runs_on_one_device(self) -> bool:
        """Predictions are one table, and a calibration has one result: they use one device unless told otherwise."""
        told = "devices" in (self.given[self.verb].get("trainer") or {})
        return not told and (self.verb == "predict" or (self.verb == "validate" and self.calibrates))

    def _ordered(self, callbacks: list[Callback]) -> list[Callback]:
        """Calibration comes first, a weight average after everything that still changes weights."""
        return sorted(callbacks, key=lambda callback: isinstance(callback, WeightAveraging))

    def _recorders(self, run: Path, callbacks: list[Any]) -> list[Callback]:
        """What a run saves: its table, the best checkpoint, selected on validation images, and the last one."""
        best = ModelCheckpoint(
            run, "best_on_val_{epoch}", monitor="val/top1", mode="max", save_top_k=1, auto_insert_metric_name=False,
            enable_version_counter=False,
        )  # fmt: skip
        found: list[Callback] = [RecordSites(run)]
        regularizes = self.config[self.verb].model.regularizers
        if regularizes and not any(isinstance(callback, GradientRatio) for callback in callbacks):
            found.append(GradientRatio())
        return [*found, best, SaveLast(run, self.config[self.verb].save_every)]

    def _run_folder(self) -> Path:
        """Where the run goes; of several processes only the first makes a new folder, and only it writes there."""
        if self._folder is None:
            config = self.config[self.verb]
            named = config.name or (Path(self.configs[0]).stem if self.configs else config.model.arch)
            parent = config.runs / named
            if self.resumed:
                self._folder = last_folder(parent)
            else:
                self._folder = fresh_folder(parent) if first_process() else parent
        return self._folder

    def _remove_empty_folder(self) -> None:
        """Leave no folder of a run that was refused before it began."""
        if self._folder is not None and first_process():
            with suppress(OSError):  # it is not empty
                self._folder.rmdir()
                self._folder.parent.rmdir()

    def fit(self, **kwargs: Any) -> None:
        """Train, from a checkpoint if there is one; options that have changed since then are logged."""
        self.model.run_options = run_options(self.config[self.verb])
        step = -1
        if self.ckpt is not None:
            step, before = _resumed_from(self.ckpt)
            log.info("resuming from %s at step %d", self.ckpt, step)
            for change in changes(before, self.model.run_options):
                log.info("changed since the checkpoint: %s", change)
        self.trainer.fit(ckpt_path=self.ckpt, **kwargs)
        top1 = self.trainer.callback_metrics.get("val/top1")
        accuracy = "" if top1 is None else f", top-1 {float(top1):.2f} %"
        log.info("training ended at step %d%s: %s", self.trainer.global_step, accuracy, self._run_folder() / LAST)
        if self.trainer.global_step == step:
            log.warning("nothing was left to train; a longer run has more data.crop_epochs or trainer.max_steps")

    def validate(self, **kwargs: Any) -> None:
        """Evaluate, a checkpoint if there is one."""
        warnings.filterwarnings("ignore", message=UNUSED)
        self.trainer.validate(ckpt_path=self.ckpt, results_file=self.config[self.verb].results_file, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Predict, with a checkpoint if there is one."""
        warnings.filterwarnings("ignore", message=UNUSED)
        self.trainer.predict(ckpt_path=self.ckpt, output=self.config[self.verb].output, **kwargs)


def _resumed_from(ckpt: Path) -> tuple[int, dict[str, str]]:
    """Step and options of a checkpoint, which is not kept open: the run will replace it."""
    content = checkpoint.read(ckpt)[1]
    return content["global_step"], content[checkpoint.KEY].get("options", {})


def run(verb: str, arguments: Sequence[str]) -> QatCLI:
    """Run a verb and return what it built; QatError also where Lightning refuses its own options."""
    set_parsing_settings(instantiate_subclass_spec_in_any=False)  # the specs of rules are ours to read
    if TRAINER_HELP in arguments:
        parser = ArgumentParser(prog=f"qat {verb}", add_help=False, usage=f"qat {verb} [--trainer.OPTION VALUE]")
        parser.add_class_arguments(Trainer, "trainer")
        parser.print_help()
        sys.exit()
    read_old_class_paths()
    try:
        return QatCLI(verb, arguments)
    except MisconfigurationException as error:
        raise QatError(str(error)) from error
