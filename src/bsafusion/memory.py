"""How the process treats memory that it has freed."""

from __future__ import annotations

import ctypes
import sys

KEPT = 1 << 30  # bytes; the intermediate maps of one pair take less
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to :data:`KEPT` bytes for the next use, and say whether it will.

    Otherwise it hands the large maps of a network back to the system again and again, which clears each page anew: slow
    where pages are costly, as in containers and virtual machines. For the commands of this package, whose process is
    theirs; other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_TRIM_THRESHOLD, KEPT)) and bool(mallopt(_MMAP_THRESHOLD, KEPT))
