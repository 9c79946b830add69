"""`qat fit | validate | calibrate | predict`: LightningCLI over our module, our data module and our trainer."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from qat.callbacks import Calibrate, ConsoleLog, EndTogether, IntegerProducts, PlaceModule, ProgressBar, RecordSites
from qat.callbacks.time_limit import TimeLimit
from qat.cli.agreement import changes, run_options
from qat.cli.check_options import check_constructors, check_options, parse_options
from qat.cli.check_trainer import check_run, check_trainer, further_metrics
from qat.cli.checkpoint_files import CheckpointFiles
from qat.cli.configs import read_old_class_paths, with_bases
from qat.cli.loggers import need_no_folder, write_to
from qat.cli.options import add_options
from qat.cli.parse import SET_UP, instantiate
from qat.cli.parts import all_loggers, as_list, best_of, check_processes, recorders
from qat.cli.run_folder import RunFolder
from qat.cli.run_of_ckpt import find_origin, origin_of, run_name
from qat.cli.save_config import SaveConfig, write_config
from qat.cli.settle import settle
from qat.cli.summary import after_calibration, after_training, show
from qat.cli.trainer import TRAINER_DEFAULTS, Trainer
from qat.cli.words import given_configs, words_of_model
from qat.data.imagenet import ImageNetDataModule
from qat.data.options import DataOptions
from qat.data.splits import has_split
from qat.errors import QatError
from qat.runs.folder import CALIBRATED, LAST, config_name
from qat.runs.stop import Stopped, deferred, raise_if_told
from qat.training.module import QATModule

log = logging.getLogger(__name__)
NOT_OPTIONS = {  # arguments of the trainer's verbs that the command line gives itself
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
    "validate": {"model", "datamodule", "ckpt_path", "results_file"},
    "calibrate": {"model", "datamodule", "results_file"},
    "predict": {"model", "datamodule", "ckpt_path", "output"},
}
UNUSED = ".*callbacks used to create the checkpoint.*"  # evaluation needs none of them


class QatCLI(LightningCLI):
    """One verb: its parser, its checks, and what it builds: ``model``, ``datamodule`` and ``trainer``."""

    def __init__(self, verb: str, arguments: Sequence[str]) -> None:
        self.verb, self.configs, self.words = verb, given_configs(arguments), words_of_model(arguments)
        self.origin = find_origin(verb, arguments)
        self.trainer: Trainer
        self.folder = RunFolder()
        try:
            with deferred():
                self._build_and_run(self.origin.arguments(verb, arguments))
        except BaseException:
            self.folder.close(refused=True)
            raise
        self.folder.close(refused=False)

    def _build_and_run(self, arguments: Sequence[str]) -> None:
        super().__init__(
            QATModule,
            ImageNetDataModule,
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"prog": "qat", "exit_on_error": False},
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
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
        known = [action.dest for action in self._subcommand_parsers[self.verb]._actions]
        self.config, self.given = parse_options(parser, args, self.verb, known, get_type_hints(L.Trainer.__init__))

    def before_instantiate_classes(self) -> None:
        """Find the run folder of a resumed run, then settle everything before a model is built or downloaded."""
        config = self.config[self.verb]
        config.base = None  # its content is in the config by now
        check_options(self.verb, config)
        check_trainer(config.trainer, self.verb, tuple(further_metrics(config.model, config.data.held_out)))
        check_constructors(self.parser, self.config, config)
        if self.origin.ckpt is None and config.ckpt is not None:  # it stands in a config
            self.origin = origin_of(self.verb, config.ckpt, config.runs, run_name(config.name, self.configs))
        if self.origin.goes_on:
            self._run_folder()  # nobody else may be writing there
        settled = settle(self.verb, config, self.given[self.verb], self.origin.ckpt)
        self.ckpt, self.calibrates, self.evaluates = settled.ckpt, settled.calibrates, settled.evaluates
        self.resumed, self.replaced = settled.run, settled.replaced

    def instantiate_classes(self) -> None:
        """Build the data module, the trainer and the model from their options."""
        config = self.config.clone()  # what is saved does not name the folder
        if self.verb == "fit" and config[self.verb].trainer.logger not in (None, True, False):
            write_to(self._run_folder(), config[self.verb].trainer.logger)
        self.config_init = instantiate(self.parser, config)
        options = self.config_init[self.verb]
        loose = options.data.images if self.verb == "calibrate" else None
        self.datamodule = ImageNetDataModule(options.data, options.model.classes, loose)
        if self.resumed is not None and self.resumed.data is not None:
            self.datamodule.load_state_dict(self.resumed.data)  # the passes that were made are part of the run's length
        self.trainer = self.instantiate_trainer()  # what is wrong with it shows before weights are read or downloaded
        self.model = QATModule(options.model)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the callbacks and the run folder of a training run, or of a calibration."""
        options = self.config_init[self.verb]
        config = options.trainer
        bar = sys.stdout.isatty() and config.enable_progress_bar is not False
        callbacks = [*as_list(config.callbacks), ProgressBar() if bar else ConsoleLog()]
        kwargs["plugins"] = [*as_list(config.plugins), CheckpointFiles(self.config[self.verb].trust)]
        if self.verb == "fit" or self.calibrates:
            kwargs["default_root_dir"] = run = self._run_folder()
        if self.verb == "fit":
            callbacks += recorders(run, self.config[self.verb], callbacks)
            self.save_config_kwargs = {"config_filename": config_name(run), "folder": run, "replaced": self.replaced}
            kwargs["max_epochs"] = len(self.datamodule.passes) if config.max_epochs is None else config.max_epochs
            kwargs["logger"] = all_loggers(run, config.logger)
        else:
            self.save_config_callback = None
            kwargs |= {"logger": False, "enable_checkpointing": False}
            callbacks += [RecordSites(self.folder.path)] if self.folder.path else []
            kwargs |= {} if self.evaluates else {"limit_val_batches": 0}
            callbacks += [IntegerProducts()] if self.verb == "validate" and self.config[self.verb].integer else []
        kwargs["enable_progress_bar"] = bar
        if self._runs_on_one_device():
            kwargs["devices"] = 1
        calibrate = []
        if self.calibrates:
            given = (self._parser(self.verb), self.config[self.verb], self.replaced)
            begin, keeps = partial(write_config, *given, run / config_name(run)), self.verb in ("fit", "calibrate")
            calibrate = [Calibrate(options.calibration, self.folder.path, keeps, begin)]
        try:
            if config.max_time is not None:
                callbacks.append(TimeLimit(config.max_time))
                kwargs["max_time"] = None
            callbacks = self._ordered([EndTogether(), PlaceModule(), *callbacks, *calibrate])
            trainer: Any = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except QatError:
            raise
        except (MisconfigurationException, *SET_UP) as error:
            raise QatError(f"trainer: {error}") from error
        check_processes(trainer)
        if self.verb == "fit":
            accumulate = self.datamodule.plan_batches(trainer.world_size, config.accumulate_grad_batches)
            trainer.accumulate_grad_batches = accumulate
        check_run(trainer, self.datamodule, self.verb)
        for callback in calibrate:
            callback.check_devices(trainer.world_size, trains=self.verb == "fit")
        return trainer

    def _runs_on_one_device(self) -> bool:
        """Predictions are one table, and a calibration has one result: they use one device unless told otherwise."""
        told = "devices" in (self.given[self.verb].get("trainer") or {})
        return not told and (self.verb == "predict" or (self.verb != "fit" and self.calibrates))

    def _ordered(self, callbacks: list[Callback]) -> list[Callback]:
        """Calibration comes after all that may refuse to start, a weight average after all that changes weights."""
        return sorted(callbacks, key=lambda callback: isinstance(callback, WeightAveraging))

    def _run_folder(self) -> Path:
        config = self.config[self.verb]
        return self.folder.open(config, self.origin, run_name(config.name, self.configs))

    def fit(self, **kwargs: Any) -> None:
        """Train, from a checkpoint if there is one; options that have changed since then are logged."""
        self.model.run_options = run_options(self.config[self.verb])
        step = -1
        if self.resumed is not None:
            step = self.resumed.step
            log.info("resuming from %s at step %d", self.ckpt, step)
            for change in changes(self.resumed.options, self.model.run_options):
                log.info("changed since the checkpoint: %s", change)
        try:
            self.trainer.fit(ckpt_path=self.ckpt, **kwargs)
        except Stopped as stopped:
            if stopped.signum:
                raise
            show(f"trainer.max_time is over: {stopped}", f"checkpoint: {self._run_folder() / LAST}")
            return
        except QatError as error:
            if self.trainer.global_step <= step or not (self._run_folder() / LAST).is_file() or "--ckpt" in str(error):
                raise
            raise QatError(f"{error}; then go on with --ckpt last") from error
        raise_if_told(f"at step {self.trainer.global_step}, which was the last one")
        if self.trainer.is_global_zero:
            step_now, metrics = self.trainer.global_step, self.trainer.callback_metrics
            root = self.config[self.verb].data.root
            show(*after_training(step_now, metrics, self._run_folder() / LAST, best_of(self.trainer), root))
        if self.trainer.global_step == step:
            log.warning("nothing was left to train; a longer run has more data.crop_epochs or trainer.max_steps")

    def validate(self, **kwargs: Any) -> None:
        """Evaluate, a checkpoint if there is one."""
        warnings.filterwarnings("ignore", message=UNUSED)
        self.trainer.validate(ckpt_path=self.ckpt, results_file=self.config[self.verb].results_file, **kwargs)
        raise_if_told()

    def calibrate(self, **kwargs: Any) -> None:
        """Calibrate, evaluate if that is wanted, and name the commands that can follow."""
        config, root = self.config[self.verb], self.config[self.verb].data.root
        if not self.evaluates and config.validate is None:
            log.info("no validation images (data.root is %s), so the calibrated model is not evaluated", root or "null")
        results = self.trainer.calibrate(results_file=config.results_file, **kwargs)
        raise_if_told()
        if self.trainer.is_global_zero:
            has_val = root is not None and has_split(root, "val")
            plans = config.trainer.max_steps != -1 or config.data.crop_epochs != DataOptions.crop_epochs
            show(*after_calibration(results, self._run_folder() / CALIBRATED, root, has_val, self.words, plans))

    def predict(self, **kwargs: Any) -> None:
        """Predict, with a checkpoint if there is one."""
        warnings.filterwarnings("ignore", message=UNUSED)
        self.trainer.predict(ckpt_path=self.ckpt, output=self.config[self.verb].output, **kwargs)
        raise_if_told()


def run(verb: str, arguments: Sequence[str]) -> QatCLI:
    """Run a verb and return what it built; QatError also where Lightning refuses its own options."""
    set_parsing_settings(instantiate_subclass_spec_in_any=False)  # the specs of rules are ours to read
    read_old_class_paths()
    need_no_folder()
    try:
        return QatCLI(verb, arguments)
    except MisconfigurationException as error:
        raise QatError(str(error)) from error
