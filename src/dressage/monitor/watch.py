"""Alarms while a stage learns: its numbers are judged at every step, and one that stays bad ends the run."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dressage.errors import ConfigError
from dressage.monitor.health import BOUNDS, Verdict, verdicts


class Watch:
    """What a stage's numbers have said so far.

    `settings` are the stage's own, `before` the rows of metrics.jsonl of an interrupted attempt: a run that goes on
    gives the alarms that one without interruption gives.
    """

    def __init__(self, stage: str, settings: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = ()) -> None:
        self.stage, self.settings = stage, settings
        self.action: str = settings["health"]["on_alarm"]
        self._patience: int = settings["health"]["patience_steps"]
        self._best_by: str = settings["health"]["best_by"]
        self._bad: Counter[str] = Counter()
        self._told: dict[str, str] = {}
        self.rows: list[Mapping[str, Any]] = []
        for row in before:
            self.see(row)

    def see(self, row: Mapping[str, Any]) -> tuple[list[Verdict], Verdict | None]:
        """Takes a step's row: verdicts that are worse than they were, and the one that should end the run, if any."""
        self.rows.append(row)
        worse, fatal = [], None
        for verdict in verdicts(self.stage, self.rows, self.settings):
            if verdict.level != self._told.get(verdict.metric, "ok") and verdict.level != "ok":
                worse.append(verdict)
            self._told[verdict.metric] = verdict.level
            if verdict.metric in row:  # what is measured now and then is not worse for the steps between
                self._bad[verdict.metric] = self._bad[verdict.metric] + 1 if verdict.level == "stop" else 0
            no_number = verdict.level == "stop" and verdict.value != verdict.value
            if self.action != "warn" and (no_number or self._bad[verdict.metric] >= self._patience):
                fatal = fatal or verdict
        return worse, fatal

    def best(self, steps: Sequence[int]) -> int | None:
        """Which of these checkpoints' steps to go back to; None if there is none from before the alarm."""
        after = {row["step"]: row.get(self._best_by) for row in self.rows}
        # A checkpoint holds the weights after its step; what they are worth shows in the step that follows.
        known = {step: after[step + 1] for step in steps if after.get(step + 1) is not None}
        if known:
            return max(known, key=lambda step: (known[step], -step))
        sound = [step for step in steps if step <= self.rows[-1]["step"] - max(self._bad.values(), default=0)]
        return max(sound, default=None)


def require_known(bounds: Iterable[str]) -> None:
    """ConfigError if bounds are set for a metric that has none."""
    for name in bounds:
        if name not in BOUNDS:
            near = difflib.get_close_matches(name, BOUNDS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"those that have: {', '.join(BOUNDS)}"
            raise ConfigError(f"health.bounds.{name}: has no bounds; {advice}")


def told(stage: str, verdict: Verdict) -> str:
    """A verdict in a line: where, what, why, and what to turn."""
    value = "not a number" if verdict.value != verdict.value else f"{verdict.value:.3g}"
    return f"{stage}: {verdict.metric} = {value}: {verdict.reason}; {verdict.setting}"
