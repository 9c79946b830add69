"""This process: which of several it is, and how it keeps memory. Nothing here loads Lightning or torch."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in Lightning's order


def first_process() -> bool:
    """Whether this is the only process, or the first of several: the one that writes and logs."""
    ranks = (os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    return int(next(ranks, "0")) == 0


def keep_freed_memory() -> bool:
    """Let glibc keep memory that was freed, for the next tensor; whether that was possible.

    By default it returns large blocks to the system, and then the fresh pages of an activation cost more time than the
    arithmetic on it. The values of ``mallopt`` are the largest that glibc takes.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_THRESHOLD, 2**25))
