"""How much memory this process has and had, and whether it gives back what it will want again."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

_NOW = Path("/proc/self/statm")


def rss_gb() -> float:
    """What it has in RAM now, in 10^9 bytes; where the system does not say, the most it has had."""
    try:
        return round(int(_NOW.read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 1e9, 4)
    except OSError:
        return peak_rss_gb()


def peak_rss_gb() -> float:
    """The most it has had in RAM, in 10^9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def keep_freed_memory() -> bool:
    """From now on the C library keeps freed blocks for the next step; False where it cannot be told so.

    glibc gives large blocks back to the system and takes them again at every layer, and each page of them is cleared
    anew: 8 % of the time of scoring and learning. Blocks above 32 MB, the largest threshold that it takes, still go
    back. Whoever has set MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ is left alone.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 1 << 30) and mallopt(_M_MMAP_THRESHOLD, 32 << 20))


def give_back_memory() -> None:
    """What was kept so goes back to the system now: what comes next, learning or another stage, wants other blocks."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
