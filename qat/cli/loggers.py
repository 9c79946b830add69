"""Loggers of Lightning that a user adds: they write to the folder of the run, unless they are told another one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

HERE = "."  # default folder of loggers; here it stands for the folder of the run
DEFAULTS = (HERE, "./mlruns")


def need_no_folder() -> None:
    """Give the loggers that demand a folder the default that others have, so that the parser does not ask for one."""
    for kind in (CSVLogger, TensorBoardLogger):
        init: Any = kind.__init__
        (_, first, *_) = inspect.signature(init).parameters.values()
        if first.name == "save_dir" and first.default is first.empty:
            init.__defaults__ = (HERE, *(init.__defaults__ or ()))


def write_to(folder: Path, loggers: Any) -> None:
    """Let loggers that have no folder of their own write to ``folder``; their options are changed in place.

    Args:
        folder: folder of the run.
        loggers: options of one logger or of several, not yet built, or anything else that the trainer takes.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        options = getattr(logger, "init_args", None)
        if options is not None and str(options.get("save_dir")) in DEFAULTS:
            options["save_dir"] = str(folder)
