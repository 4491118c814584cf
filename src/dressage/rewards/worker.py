"""The other side of `rewards.functions`: a process that calls one function, a line of JSON in and a line out.

    python -m dressage.rewards.worker package.module:name '{"more": "arguments"}'

It says {"ready": true} first, or why not. Nothing of Dressage or torch is loaded here.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
"""Of <linux/prctl.h>: a signal for this process when the thread that started it ends."""


def load(name: str) -> Callable[..., Any]:
    """The function "package.module:name" or "path/file.py:name"."""
    where, _, wanted = name.rpartition(":")
    if where.endswith(".py"):
        path = Path(where).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {where}")
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    function = getattr(module, wanted)
    if not callable(function):
        raise TypeError(f"{wanted} is no function")
    return function  # type: ignore[no-any-return]


def called(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """{"scores": [...]}, NaN where the function gave None, or {"error": "one line"}."""
    try:
        scores = function(**arguments)
        return {"scores": [float("nan") if score is None else float(score) for score in scores]}
    except BaseException as error:
        return {"error": line_of(error)}


def line_of(error: BaseException) -> str:
    """What went wrong, and on which line of whose file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return said if not frames or frames[-1].filename == __file__ else f"{said} ({_place(frames[-1])})"


def _place(frame: traceback.FrameSummary) -> str:
    return f"{os.path.basename(frame.filename)}:{frame.lineno}"


def end_with_parent() -> None:
    """Whoever is killed cannot end us: a function that hangs would go on for ever. (Linux; elsewhere for its call.)

    The system does it, since a thread of ours would wait for Python's lock, which a regular expression holds.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serves until its input ends."""
    end_with_parent()
    # The function may print and read: what it prints goes to stderr, and there is nothing for it to read.
    questions, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    more = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    try:
        function = load(sys.argv[1])
    except BaseException as error:
        say({"error": line_of(error)})
        return
    say({"ready": True})
    for line in questions:
        say(called(function, json.loads(line) | more))


if __name__ == "__main__":
    main()
