"""Images that cannot be read: the main process stops the run, or skips and counts them."""

from __future__ import annotations

import logging
from collections import Counter

from qat.data.images import Batch
from qat.errors import QatError

log = logging.getLogger(__name__)


class UnreadableImages:
    """Reports the images of each batch that could not be read.

    Args:
        skip: warn once about each image and count it; otherwise the first one stops the run.

    Attributes:
        counts: how often each message, "path: reason", was met.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self._noted = False

    def report(self, batch: Batch) -> Batch:
        """Return the batch; QatError for an image that stops the run."""
        if batch.notes and not self._noted:  # said once: a folder may hold many of a kind
            log.warning("%s; this is not said of other images", batch.notes[0])
            self._noted = True
        if batch.fatal:
            raise QatError(batch.fatal)
        if batch.bad and not self.skip:
            raise QatError(f"cannot read {batch.bad[0]}; repair it, or set data.on_bad_image: skip")
        for message in batch.bad:
            if message not in self.counts:
                log.warning("skipped %s", message)
            self.counts[message] += 1
        return batch

    def report_training(self, batch: Batch) -> Batch:
        """Like `report`; a batch without any image is a QatError too, because nothing can be learned from it."""
        if not len(self.report(batch).images):
            raise QatError(f"a whole batch of training images cannot be read, first {batch.bad[0]}")
        return batch

    def summarize(self) -> None:
        """Log how many images were skipped."""
        if self.counts:
            log.warning("%d unreadable images, skipped %d times", len(self.counts), self.counts.total())
