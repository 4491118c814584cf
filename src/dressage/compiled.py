"""The parts in C: built when the package is installed, and done without where they could not be."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The part that setup.py builds of this name; None where it was not, or cannot be loaded."""
    for suffix in EXTENSION_SUFFIXES:
        if (path := Path(__file__).with_name(f"_{name}{suffix}")).is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                return None
    return None
