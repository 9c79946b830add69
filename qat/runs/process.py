"""Which of several processes this one is. Nothing here loads Lightning or torch."""

from __future__ import annotations

import os

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order


def first_process() -> bool:
    """Whether this is the only process, or the first of several: the one that writes and logs."""
    ranks = (os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    return int(next(ranks, "0")) == 0
