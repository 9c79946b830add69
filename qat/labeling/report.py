"""The last lines of a command that has made a store."""

from __future__ import annotations

import logging
import shlex
import time
from datetime import timedelta
from pathlib import Path

from qat.data.softlabels.opening import read_done
from qat.labeling.output import parts_of

log = logging.getLogger(__name__)


class Report:
    """Begins to count when it is made.

    Args:
        out: the store.
        root: folder of the images.
    """

    def __init__(self, out: Path, root: Path) -> None:
        self.out, self.root = out, root
        self._before = int(read_done(out).sum())
        self._start = time.monotonic()

    def end(self) -> None:
        """Say how many labels there are, how long that took, how large the store is, and what comes next."""
        done = read_done(self.out)
        seconds = timedelta(seconds=round(time.monotonic() - self._start))
        log.info("%s: %d of %d images have labels, %d of them made now in %s; %.1f MB", self.out, done.sum(), len(done),
                 done.sum() - self._before, seconds, self.out.stat().st_size / 1e6)  # fmt: skip
        partial = ""
        if not done.all():
            log.warning("%d images have none: repair them and run the same command again, or train without them",
                        len(done) - done.sum())  # fmt: skip
            partial = " --data.softlabels_partial true"
        words = shlex.join(["--data.root", str(self.root), "--data.softlabels", str(self.out)])
        log.info("next: qat fit --config CONFIG %s%s", words, partial)


def how_far(out: Path) -> str:
    """How far a command that was stopped has come, in words that follow "stopped"."""
    done = read_done(out)
    for part in parts_of(out):
        done = done | read_done(part)
    return f"with labels of {done.sum()} of {len(done)} images in {out}; run the same command again to go on"
