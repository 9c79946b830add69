"""The config of a run in its folder, from which the run can be resumed anywhere on the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import SaveConfigCallback

from qat.runs.writing import replacing

FILES = {  # options that name a file or a folder, by their group
    "": ("runs", "ckpt"),
    "model": ("checkpoint", "quant_checkpoint", "recipe", "teacher_checkpoint"),
    "data": ("root", "images", "softlabels", "class_map", "val_labels"),
}


AS_GIVEN = ("recipe", "rules", "w_bits", "a_bits", "checkpoint", "checkpoint_key", "quant_checkpoint", "fresh_head")


class SaveConfig(SaveConfigCallback):
    """Writes all options of a run to a file when training starts: a command that was refused before leaves none.

    Args:
        folder: folder of the run.
        replaced: options of the model before those of a checkpoint took their place. Recipe and weights are saved as
            they were given, so that the file can begin another run too.
        **kwargs: for Lightning's callback, which brings parser and options.
    """

    def __init__(self, *args: Any, folder: Path, replaced: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder, self.replaced = folder, replaced

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait for the start of training."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        if not trainer.is_global_zero:
            return
        write_config(self.parser, self.config, self.replaced, self.folder / self.config_filename)


def write_config(parser: ArgumentParser, options: Any, replaced: Mapping[str, Any], path: Path) -> Path:
    """Write the options of a command, and return the path of the file.

    Args:
        parser: of the command.
        options: all of them.
        replaced: options of the model before those of a checkpoint took their place.
        path: of the YAML file.
    """
    config = options.clone()
    for name in AS_GIVEN:
        config.model[name] = replaced.get(name, config.model[name])
    config = with_absolute_paths(config)
    config.trust = config.model.trust = False  # only a command line can say it
    if "resume" in config:
        config.resume = None
    text = parser.dump(config, skip_unset=False)
    with replacing(path) as file:
        file.write(text)
    return path


def with_absolute_paths(config: Any) -> Any:
    """A copy of the options in which a path holds in any working directory, where there is such a file or folder."""
    copy = config.clone()
    for group, names in FILES.items():
        options = copy[group] if group else copy
        for name in names:
            value = options.get(name)
            if isinstance(value, Path) and value.exists():
                options[name] = value.absolute()
            if isinstance(value, str) and Path(value).is_file():  # not a word that a folder happens to have as its name
                options[name] = str(Path(value).absolute())
    return copy
