"""One log on stderr, without the noise of libraries."""

from __future__ import annotations

import logging
import sys
import warnings

from qat.runs.process import first_process

NOISE = (
    ".*does not have many workers.*",  # the choice of data.workers
    ".*isinstance\\(treespec, LeafSpec\\).*",  # lightning 2.6 under torch 2.15
    "Checkpoint directory .* exists and is not empty",  # config.yaml lies there before the first checkpoint
    "\\s*By default only one Jsonargparse",  # its next version refuses to import a class of os; so do we
    "\\s*Importing '.*' is not allowed",
    ".*could not find the monitored key.*",  # training ended before the first validation
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # they are averaged over all images by then
    ".*The dirpath has changed from.*",  # a run that starts from the checkpoint of another selects its own best one
)
CHATTY = ("lightning", "lightning.pytorch", "lightning.fabric")  # seeds, devices that are not there, advertisements


def set_up_logging() -> None:
    """Log to stderr; of several processes only the first logs more than warnings."""
    level = logging.INFO if first_process() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[_handler()])
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


def quiet_libraries() -> None:
    """Hide the information of Lightning, which sets its own level and handler when it is imported: call it after."""
    for name in CHATTY:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()


def _handler() -> logging.Handler:
    if not sys.stderr.isatty():
        return logging.StreamHandler()
    from rich.logging import RichHandler

    return RichHandler(show_path=False)
