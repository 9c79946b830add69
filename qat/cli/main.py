"""The command line: `qat fit | validate | predict | describe`, LightningCLI over our three classes."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.logging import RichHandler

from qat import checkpoint
from qat.callbacks import Calibrate, ConsoleLog, GradientRatio, RecordSites, SaveLast
from qat.cli.agreement import changes, check_agreement, run_options
from qat.cli.trainer import Trainer
from qat.data.check import check_data
from qat.data.imagenet import ImageNetDataModule
from qat.errors import QatError, bad_input
from qat.models import default_preprocessing
from qat.recipe import build_recipe
from qat.runs.folder import LAST, AtomicCheckpoints, config_name, first_process, fresh_folder, last_folder
from qat.runs.metrics import MetricsFile
from qat.training.module import QATModule

DESCRIPTION = "Low-bit quantization of timm vision transformers. Start with: qat fit --config configs/deit_t_w4a4.yaml"
log = logging.getLogger(__name__)
TRAINER_DEFAULTS = {
    "reload_dataloaders_every_n_epochs": 1,  # passes differ in crops per image
    "use_distributed_sampler": False,  # the data module spreads the images itself
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # `qat describe` says more
}

NOISE = (
    ".*does not have many workers.*",  # the choice of data.workers
    ".*isinstance\\(treespec, LeafSpec\\).*",  # lightning 2.6 under torch 2.15
    "Checkpoint directory .* exists and is not empty",  # config.yaml lies there before the first checkpoint
    ".*could not find the monitored key.*",  # training ended before the first validation
)
UNUSED = ".*callbacks used to create the checkpoint.*"  # evaluation needs none of them


class QatCLI(LightningCLI):
    """Settles, before anything is built, what comes from the checkpoint, from the data and from timm."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and the arguments of each that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
            "validate": {"model", "datamodule", "ckpt_path"},
            "predict": {"model", "datamodule", "ckpt_path"},
            "describe": {"model"},
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything."""
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, image order and crops.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options that belong to no class."""
        parser.add_argument(
            "--ckpt",
            type=Path | None,
            default=None,
            help="Checkpoint that describes its own model; fit --ckpt last goes on in the newest run of NAME.",
        )
        parser.add_argument(
            "--name", type=str | None, default=None, help="Name of the run; the first config's when null."
        )
        parser.add_argument("--runs", type=Path, default=Path("runs"), help="Runs go to RUNS/NAME/DATE.")
        parser.add_argument(
            "--save_every", type=int, default=500, help="Optimizer steps of fit between two writes of last.ckpt."
        )
        parser.add_lightning_class_args(Calibrate, "calibration")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and keep apart what was really given: a checkpoint must not be contradicted."""
        self.config = parser.parse_args(args)
        self.given = parser.parse_args(args, defaults=False)

    def before_instantiate_classes(self) -> None:
        """Everything that can be wrong is looked at here, before a model is built or downloaded."""
        config = self.config[str(self.subcommand)]
        model, data = config.model, config.data
        self.ckpt: Path | None = config.ckpt
        self._folder: Path | None = None
        self.resumed = self.subcommand == "fit" and str(config.ckpt) == "last"
        if self.subcommand == "fit" and self.ckpt is not None and not config.config:
            raise QatError(
                "qat fit --ckpt goes on with a run: give its --config too, for the data, teacher and schedule"
            )
        if self.resumed:
            self.ckpt = self._run_folder() / LAST
        if self.ckpt is not None:
            card, content = checkpoint.read(self.ckpt)
            if self.subcommand == "fit" and "optimizer_states" not in content:
                raise QatError(
                    f"{self.ckpt} holds weights only, no state of a run to go on with: to start from them, give it as "
                    "--model.quant_checkpoint, with the recipe that it was made with"
                )
            check_agreement(card, self.ckpt, self.given[str(self.subcommand)])
            stored = {"arch": card.arch, "model_args": card.model_args, "num_classes": card.num_classes}
            stored |= {"recipe": "float", "rules": card.rules, "w_bits": None, "a_bits": None}
            stored |= {"checkpoint": None, "quant_checkpoint": None, "fresh_head": False, "classes": card.classes}
            for key, value in stored.items():
                model[key] = value
            data.preprocessing = model.preprocessing = card.preprocessing
        if model.arch is None:
            raise QatError("model.arch is not set: give the name of a timm model, a --config or a --ckpt")
        table = build_recipe(model.recipe, model.rules or [], model.w_bits, model.a_bits)
        stated = {**(model.preprocessing or {}), **(data.preprocessing or {})}
        preprocessing = default_preprocessing(model.arch, model.model_args).override(stated)
        data.preprocessing = model.preprocessing = preprocessing.to_dict()
        for part in (data, model):
            part.seed = config.seed_everything if part.seed is None else part.seed
        if model.quant_checkpoint is not None:
            checkpoint.read(model.quant_checkpoint, "--model.quant_checkpoint")
        self.calibrates = bool(table) and self.ckpt is None and model.quant_checkpoint is None
        if self.given[str(self.subcommand)].get("calibration") and not self.calibrates:
            log.info("the model is calibrated already: calibration.* is not used")
        if self.subcommand != "describe":
            check_data(str(self.subcommand), model, data, self.ckpt, self.calibrates)
        if self.subcommand != "fit":
            model.teacher = None
        if self.subcommand == "describe":
            model.checkpoint = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the callbacks and the run folder of a training run."""
        config = self.config_init[self.subcommand].trainer
        bar = sys.stdout.isatty() and config.enable_progress_bar is not False
        callbacks = [*(config.callbacks or []), RichProgressBar() if bar else ConsoleLog()]
        if self.subcommand == "fit" or (self.calibrates and self.subcommand != "describe"):
            kwargs["default_root_dir"] = run = self._run_folder()
            kwargs["plugins"] = [*(config.plugins or []), AtomicCheckpoints()]
        if self.subcommand == "fit":
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
        trainer: Any = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        for callback in [c for c in trainer.callbacks if isinstance(c, Calibrate)]:
            callback.folder = self._folder
            if not self.calibrates or self.subcommand == "describe":
                trainer.callbacks.remove(callback)
            else:
                callback.check_devices(trainer.world_size, trains=self.subcommand == "fit")
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        """Calibration comes first, a weight average after everything that still changes weights."""
        ours = [*callbacks, *config["callbacks"]]
        config["callbacks"] = sorted(ours, key=lambda callback: isinstance(callback, WeightAveraging))
        return super()._instantiate_trainer(config, [])

    def _recorders(self, run: Path, callbacks: list[Any]) -> list[Callback]:
        """What a run saves: its table, the best checkpoint, selected on validation images, and the last one."""
        best = ModelCheckpoint(
            run, "best_on_val_{epoch}", monitor="val/top1", mode="max", save_top_k=1, auto_insert_metric_name=False,
            enable_version_counter=False,
        )  # fmt: skip
        found: list[Callback] = [RecordSites(run)]
        if self.model.regularizers and not any(isinstance(callback, GradientRatio) for callback in callbacks):
            found.append(GradientRatio())
        return [*found, best, SaveLast(run, self.config[self.subcommand].save_every)]

    def _run_folder(self) -> Path:
        """Where the run goes; of several processes only the first makes a new folder, and only it writes there."""
        if self._folder is None:
            config = self.config[self.subcommand]
            files = [str(path) for path in config.config or [] if path]
            parent = config.runs / (config.name or (Path(files[0]).stem if files else config.model.arch))
            if self.resumed:
                self._folder = last_folder(parent)
            else:
                self._folder = fresh_folder(parent) if first_process() else parent
        return self._folder

    def fit(self, **kwargs: Any) -> None:
        """Train, from a checkpoint if there is one; what has changed since then is said."""
        self.model.options = run_options(self.config[self.subcommand])
        step = -1
        if self.ckpt is not None:
            content = checkpoint.read(self.ckpt)[1]
            step = content["global_step"]
            log.info("going on from %s at step %d", self.ckpt, step)
            for change in changes(content[checkpoint.KEY].get("options", {}), self.model.options):
                log.info("other than in the checkpoint: %s", change)
        self.trainer.fit(ckpt_path=self.ckpt, **kwargs)
        if self.trainer.global_step == step:
            log.warning("nothing was left to train; a longer run has more data.crop_epochs or trainer.max_steps")

    def validate(self, **kwargs: Any) -> None:
        """Evaluate, a checkpoint if there is one."""
        warnings.filterwarnings("ignore", message=UNUSED)
        self.trainer.validate(ckpt_path=self.ckpt, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Predict, with a checkpoint if there is one."""
        warnings.filterwarnings("ignore", message=UNUSED)
        self.trainer.predict(ckpt_path=self.ckpt, **kwargs)

    def describe(self, model: QATModule, datamodule: Any = None, **kwargs: Any) -> None:
        """Print the table; the steps of a checkpoint are loaded, so that it shows them as calibrated."""
        if self.ckpt is not None:
            model.model.load_state_dict(checkpoint.load(self.ckpt).state_dict())
        self.trainer.describe(model, **kwargs)  # type: ignore[attr-defined]


def run(args: Sequence[str]) -> QatCLI:
    """Run a command and return what it built: ``model``, ``datamodule`` and ``trainer``; raises what went wrong."""
    set_parsing_settings(instantiate_subclass_spec_in_any=False)  # the specs of rules are ours to read
    return QatCLI(
        QATModule,
        ImageNetDataModule,
        trainer_class=Trainer,
        trainer_defaults=TRAINER_DEFAULTS,
        parser_kwargs={"prog": "qat", "exit_on_error": False, "description": DESCRIPTION},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # our checkpoints describe themselves
        args=list(args),
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 2 with one line on stderr when the input was bad."""
    set_up_logging()
    try:
        run(sys.argv[1:] if args is None else args)
    except (QatError, ArgumentError, MisconfigurationException, ValueError) as error:
        if (bad := bad_input(error)) is None:
            raise
        print(f"qat: error: {' '.join(str(bad).split())}", file=sys.stderr)
        return 2
    return 0


def console() -> None:
    """Entry point of the command `qat`."""
    sys.exit(main())


def set_up_logging() -> None:
    """One log on stderr, without the noise of libraries."""
    handler: logging.Handler = RichHandler(show_path=False) if sys.stderr.isatty() else logging.StreamHandler()
    level = logging.INFO if first_process() else logging.WARNING  # one log, however many processes
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # devices that are not there, and advertisements
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
