"""How much memory this process has and had, and whether it gives back what it will want again."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from importlib.util import find_spec
from pathlib import Path

from dressage.compiled import library

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
    """From now on freed blocks are kept for the next step, and torch's lie without gaps; False where neither can be.

    glibc gives large blocks back to the system and takes them again at every layer, and each page of them is cleared
    anew: 8 % of the time of scoring and learning. What it keeps is too scattered to be used again: a learning pass
    takes nearly twice what is alive in it, and with arena.c, where that was built, 1.1 times (benchmarks/kept.py).
    Whoever has set MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ is left alone; with LD_PRELOAD, which may bring
    another allocator, torch's blocks are.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    if "LD_PRELOAD" not in os.environ:
        use_arena()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return has_arena()
    return bool(mallopt(_M_TRIM_THRESHOLD, 1 << 30) and mallopt(_M_MMAP_THRESHOLD, 32 << 20)) or has_arena()


def use_arena() -> None:
    """torch's blocks lie where arena.c puts them from now on, if it can. torch itself need not be loaded for that."""
    arena, torch = library("arena"), find_spec("torch")
    if arena is None or torch is None or torch.origin is None:
        return
    try:
        ctypes.CDLL(str(Path(torch.origin).with_name("lib") / "libc10.so"))  # of torch, the part that allocates
    except OSError:
        return
    arena.arena_use()


def has_arena() -> bool:
    """Whether torch's blocks lie where arena.c puts them."""
    arena = library("arena")
    return arena is not None and bool(arena.arena_used())


def give_back_memory() -> None:
    """What was kept so goes back to the system now: what comes next, learning or another stage, wants other blocks."""
    if (arena := library("arena")) is not None:
        arena.arena_trim()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
