"""How much memory this process has and had."""

from __future__ import annotations

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
