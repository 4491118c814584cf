"""Rewards by a Python function, in a process of its own.

A thread cannot be ended: a function that hangs in one would hold a core for the rest of the run, and one that hangs
inside a regular expression would hold Python's lock, so that no time limit were ever looked at. A process can.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Timer
from typing import Any

from dressage.rewards.parts import Ungraded, request
from dressage.schema import Rollout

START_SECONDS = 120.0
"""For the function's imports."""


@dataclass
class FunctionReward:
    """Grades by "package.module:name" or "path/file.py:name"; its process is started when it is first needed."""

    function: str
    timeout_seconds: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keywords it is given each time beside the answers."""
    process: subprocess.Popen[str] | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[object]:
        """One call for all; Ungraded if it raises, hangs or its process ends."""
        if self.process is None or self.process.poll() is not None:
            # One that was killed since the last call is no fault of the answers of this one.
            self.close()
            self._start()
        reply = self._exchange(json.dumps(request(rollouts)), self.timeout_seconds)
        return list(reply["scores"])

    def close(self) -> None:
        """Ends the process, and whatever it has started."""
        if self.process is not None:
            _end(self.process)
            self.process = None

    def _start(self) -> None:
        command = [sys.executable, "-m", "dressage.rewards.worker", self.function, json.dumps(dict(self.arguments))]
        # It finds what this process finds. A session of its own: Ctrl-C is for us, who then end it.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                encoding="utf-8",
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # too long for a command, or a zero byte in it
            raise Ungraded(f"{self.function:.80}: {getattr(error, 'strerror', None) or error}") from error
        weakref.finalize(self, _end, self.process)
        self._exchange("", START_SECONDS)

    def _exchange(self, question: str, seconds: float) -> dict[str, Any]:
        """What the process replies to a line; nothing is asked by an empty one."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        limit, began = Timer(seconds, _kill, [process]), time.monotonic()
        limit.daemon = True
        limit.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                if question:
                    process.stdin.write(question + "\n")
                    process.stdin.flush()
            line = process.stdout.readline()
        finally:
            limit.cancel()
        if not line.endswith("\n"):
            self.close()
            late = time.monotonic() - began >= seconds
            why = f"gave no answer in {seconds:g} s" if late else f"its process ended (exit code {process.returncode})"
            raise Ungraded(f"{self.function}: {why}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            if not question:  # it could not be loaded
                self.close()
            raise Ungraded(f"{self.function}: {reply['error']}")
        return reply


def _end(process: subprocess.Popen[str]) -> None:
    _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
