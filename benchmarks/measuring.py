"""What speed.py and peers.py share: a measurement is a process of its own, and what is measured is kept.

A script that measures takes a JSON object as its argument and ends with the line "RESULT {...}". Nothing here loads
torch: Linux hands a process's peak memory on to those it starts, so that it is the least that they can be told to have.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
RESULTS = "results.json"
Run = dict[str, Any]
"""One measurement: whose, of what, its result and peak memory."""


@dataclass(frozen=True)
class Subject:
    """Somebody who does a piece of work."""

    work: str
    name: str
    script: str
    """Below benchmarks/."""
    asked: Mapping[str, Any]
    python: str = sys.executable

    @property
    def ours(self) -> bool:
        return self.script.startswith("ours/")


class Failed(Exception):
    """A measurement that came to nothing; the message says where to look."""


class Spread(NamedTuple):
    """The median of several, and between what they lay."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int = 2) -> str:
        if self.low == self.high:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times ours theirs is: of the medians, and between what the pairs lie that were measured in turn."""
    pairs = [b / a for a, b in zip(ours, theirs, strict=False)]
    return Spread(statistics.median(theirs) / statistics.median(ours), min(pairs), max(pairs))


def process(subject: Subject, log: Path, limit_seconds: float) -> Run:
    """Runs it once. Raises Failed if it ends without a result, or not in time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if not subject.ours:
        env.pop("PYTHONPATH", None)
    load, began = os.getloadavg()[0], time.monotonic()
    with log.open("w") as file:
        command = [subject.python, str(HERE / subject.script), json.dumps(subject.asked)]
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            status, usage = _waited(child, began + limit_seconds)
        except BaseException:
            child.kill()
            child.wait()
            raise
    text = log.read_text(encoding="utf-8", errors="replace")
    told = re.findall(r"^RESULT (\{.*\})$", text, re.MULTILINE)
    if status or not told:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was said")
        raise Failed(f"{last.strip()[:160]} (exit status {status}; {log})")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "work": subject.work,
        "subject": subject.name,
        "asked": dict(subject.asked),
        "result": json.loads(told[-1]),
        "peak_rss_gb": round(usage.ru_maxrss * unit / 1e9, 3),
        "wall_seconds": round(time.monotonic() - began, 1),
        "load_before": round(load, 2),
    }


def _waited(child: subprocess.Popen[bytes], deadline: float) -> tuple[int, Any]:
    """Exit status and use of resources of this one process: subprocess tells only of all of them together."""
    while time.monotonic() < deadline:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, usage
        time.sleep(0.1)
    child.kill()
    child.wait()
    raise Failed("took longer than --limit")


class Kept:
    """The measurements of a folder; one that is there is not made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RESULTS
        told = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"runs": []}
        self.runs: list[Run] = told["runs"]
        self.machine: dict[str, Any] = told.get("machine") or machine()

    def has(self, subject: Subject, repeat: int) -> bool:
        return any(
            (run["work"], run["subject"], run["repeat"], run["asked"])
            == (subject.work, subject.name, repeat, json.loads(json.dumps(subject.asked)))
            for run in self.runs
        )

    def measure(self, subject: Subject, repeat: int, limit_seconds: float) -> None:
        """Once, unless it is there; a failure is told and leaves nothing behind."""
        if self.has(subject, repeat):
            return
        if self.machine != machine():
            raise SystemExit(f"{self.path}: is of another machine or number of threads; give another --out")
        name = re.sub(r"\W+", "-", f"{subject.work} {subject.name} {repeat}")
        try:
            run = process(subject, self.folder / "logs" / f"{name}.log", limit_seconds)
        except Failed as failure:
            print(f"{subject.work}, {subject.name}: failed: {failure}", flush=True)
            return
        self.runs = [old for old in self.runs if _place(old) != (subject.work, subject.name, repeat)]
        self.runs.append(run | {"repeat": repeat, "commit": commit() if subject.ours else None})
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": self.machine, "runs": self.runs}, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)
        print(f"{subject.work}, {subject.name}, {repeat}: {brief(run)}", flush=True)

    def of(self, work: str, name: str) -> list[Run]:
        """In the order of repeats."""
        found = [run for run in self.runs if (run["work"], run["subject"]) == (work, name)]
        return sorted(found, key=lambda run: run["repeat"])

    def subjects(self, work: str) -> list[str]:
        return list(dict.fromkeys(run["subject"] for run in self.runs if run["work"] == work))

    @property
    def works(self) -> list[str]:
        return list(dict.fromkeys(run["work"] for run in self.runs))


def _place(run: Run) -> tuple[str, str, int]:
    return run["work"], run["subject"], run["repeat"]


def brief(run: Run) -> str:
    """A measurement in a line."""
    result = run["result"]
    if "tokens_per_second" in result:
        told = "; ".join(
            f"{who} " + ", ".join(f"{batch}: {rate:.0f}" for batch, rate in rates.items())
            for who, rates in result["tokens_per_second"].items()
        )
        return f"tokens/s {told}"
    return f"{result['seconds']:.2f} s, {run['peak_rss_gb']:.2f} GB"


def machine() -> dict[str, Any]:
    """Whose numbers these are."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "all")}
    try:
        lines = dict(_fields(Path("/proc/cpuinfo").read_text(encoding="utf-8")))
        flags = lines["flags"].split()
        found["processor"] = lines["model name"]
        found["instructions"] = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
        memory = dict(_fields(Path("/proc/meminfo").read_text(encoding="utf-8")))["MemTotal"]
        found["memory_gb"] = round(int(memory.split()[0]) * 1024 / 1e9, 1)
    except (OSError, KeyError):
        found["processor"] = platform.processor() or platform.machine()
    return found


def _fields(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def commit() -> str | None:
    """Of ours: the commit, with a plus if the code differs from it."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=HERE, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
