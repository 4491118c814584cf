"""Where a run's numbers go while it runs: metrics.jsonl, samples.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from dressage.errors import DataError
from dressage.monitor.metrics import metric

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"

TELLING: Mapping[str, tuple[str, ...]] = {
    "sft": ("loss/train", "loss/heldout", "tokens_per_second"),
    "reward": ("loss/train", "accuracy/train", "accuracy/heldout"),
    "dpo": ("loss/train", "accuracy/train", "margin/train", "accuracy/heldout"),
    "ppo": ("reward/score_mean", "gold/mean", "kl/reference_per_answer", "length/mean_tokens"),
}
"""By kind of stage, what a watcher wants to see; other stages show the first three numbers they log."""

_SHORT: Mapping[str, str] = {
    "loss/train": "loss",
    "loss/heldout": "held-out loss",
    "accuracy/train": "right",
    "accuracy/heldout": "held-out right",
    "margin/train": "margin",
    "reward/score_mean": "score",
    "gold/mean": "gold",
    "kl/reference_per_answer": "KL",
    "length/mean_tokens": "length",
    "tokens_per_second": "speed",
}

_LINES = 10
"""Progress lines that a whole stage prints where the terminal cannot redraw."""
_SHOWN_SAMPLES = 5
"""Sample answers that a whole stage shows."""


class Monitor:
    """The log of one stage, a context manager around its loop.

    `stage` is the kind of stage. A resumed run says at which step it goes on and how many seconds it had taken: lines
    of later steps, which it will write again, are cut away, and its files end up as if it had never stopped (but for
    times). `start_step` 0 begins anew. Log a step before saving its checkpoint. `console` None is silent.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stage: str,
        total_steps: int,
        console: Console | None,
        tensorboard: bool = True,
        start_step: int = 0,
        seconds_before: float = 0.0,
    ) -> None:
        self.folder = folder
        self.stage = stage
        self.total_steps = total_steps
        self.start_step = start_step
        self._console = console
        self._with_tensorboard = tensorboard
        self._seconds_before = seconds_before
        self._began = time.monotonic()
        self._newest: dict[str, float] = {}
        self._printed = self._sampled = -math.inf
        self._open = ExitStack()
        self._metrics: TextIO
        self._samples: TextIO
        self._board: Any = None
        self._progress: Progress | None = None

    @property
    def seconds(self) -> float:
        """Since the stage began, earlier attempts included."""
        return self._seconds_before + time.monotonic() - self._began

    def __enter__(self) -> Monitor:
        self._began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self._open.enter_context(_continued(self.folder / METRICS_FILE, self.start_step))
        self._samples = self._open.enter_context(_continued(self.folder / SAMPLES_FILE, self.start_step))
        if self._with_tensorboard:
            self._board = _tensorboard(self.folder / "tensorboard", self.start_step)
            if self._board is not None:
                self._open.callback(self._board.close)
        if self._console is not None and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(16), TextColumn("{task.fields[news]}"), _Clock(self))
            self._progress = Progress(*columns, console=self._console, refresh_per_second=2)
            self._progress.add_task(self.stage, total=self.total_steps, completed=self.start_step, news=self._news(0))
            self._open.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl, on disk at once; a number that is not finite is written as null."""
        numbers = {name: float(value) for name, value in values.items()}
        written = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        _append(self._metrics, {"step": step, "seconds": round(self.seconds, 3), **written})
        self._newest |= numbers
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, news=self._news(step))
        elif self._console is not None and self._is_due(step):
            self._printed = step
            self._console.print(Text(f"{self.stage}  {self._news(step)}  {self._clock(step)}"), soft_wrap=True)

    def to_disk(self) -> None:
        """What was logged is still there after a power cut: before a checkpoint, from which it is not logged again."""
        for file in (self._metrics, self._samples):
            os.fsync(file.fileno())

    def sample(self, step: int, prompt: str, answer: str, reward: float, finish: str) -> None:
        """A line of samples.jsonl; the terminal shows one now and then."""
        score = reward if math.isfinite(reward) else None
        _append(self._samples, {"step": step, "prompt": prompt, "answer": answer, "reward": score, "finish": finish})
        if self._console is not None and step - self._sampled >= self.total_steps / _SHOWN_SAMPLES:
            self._sampled = step
            cut = "" if finish == "stop" else "  (cut at the length limit)"
            lines = (
                (f"  step {step}, score {reward:+.2f}{cut}\n", "dim"),
                ("  > ", "dim"),
                (f"{_one_line(prompt)}\n", "bold"),
                f"    {_one_line(answer)}",
            )
            self._console.print(Text.assemble(*lines))

    def warn(self, text: str) -> None:
        """An alarm, above the progress."""
        if self._console is not None:
            self._console.print(Text(f"  ! {text}", "yellow"), soft_wrap=True)

    def _is_due(self, step: int) -> bool:
        return step >= self.total_steps or step - self._printed >= self.total_steps / _LINES

    def _news(self, step: int) -> str:
        """12/40  score 0.31  gold 0.2  KL 2.1."""
        names = TELLING.get(self.stage) or tuple(self._newest)[:3]
        known = [(name, self._newest[name]) for name in names if name in self._newest]
        news = [f"{_SHORT.get(name, name)} {_brief(name, value)}" for name, value in known]
        return "  ".join([f"{max(step, self.start_step)}/{self.total_steps}", *news])

    def _clock(self, step: float) -> str:
        done, left = step - self.start_step, self.total_steps - step
        if done <= 0 or left <= 0:
            return clock(self.seconds)
        here = self.seconds - self._seconds_before
        return f"{clock(self.seconds)}, {clock(here / done * left)} left"


class _Clock(ProgressColumn):
    """Time since the stage began, earlier attempts included, and time left."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self._monitor = monitor

    def render(self, task: Task) -> Text:
        return Text(self._monitor._clock(task.completed), style="dim")


def _brief(name: str, value: float) -> str:
    """Short enough for four in a row: 0.312, 61 %."""
    return f"{100 * value:.0f} %" if metric(name).unit == "share" else f"{value:.3g}"


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl, numbers by name (None: was not finite); none if there is no such file.

    A torn last line, as a killed run leaves it, is passed over; DataError if another line cannot be read.
    """
    path = folder / METRICS_FILE
    rows = read_lines(path)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise DataError(f"{path}: {name} is {value!r:.40}, not a number; delete that line to go on")
    return rows


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's samples.jsonl, read as `read_metrics` reads."""
    return read_lines(folder / SAMPLES_FILE)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; a torn last line is passed over."""
    if not path.is_file():
        return []
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: not a line of JSON ({error}); delete the line to go on") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object; delete the line to go on")
        if row:
            rows.append(row)
    return rows


def write_whole(path: Path, text: str) -> None:
    """The whole file or nothing of it. A lone surrogate, which JSON can hold and UTF-8 cannot, becomes "?"."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _continued(path: Path, start_step: int) -> TextIO:
    """The file, opened to append, without the lines that a run which goes on after `start_step` will write again."""
    kept = [row for row in read_lines(path) if row.get("step", 0) <= start_step] if start_step > 0 else []
    write_whole(path, "".join(_line(row) for row in kept))
    return path.open("a", encoding="utf-8", errors="replace", newline="\n")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(_line(row))
    file.flush()


def _tensorboard(folder: Path, start_step: int) -> Any:
    """A SummaryWriter whose curves forget what came after `start_step`; None if there is no TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn("no TensorBoard here: curves go to metrics.jsonl and the report only", stacklevel=3)
        return None
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)


def _one_line(text: str, longest: int = 300) -> str:
    """A text that cannot move the cursor or change colours: line breaks and control characters become spaces."""
    line = "".join(char if char.isprintable() else " " for char in text[: longest + 1])
    return " ".join(line.split()) if len(line) <= longest else " ".join(line[:longest].split()) + " …"
