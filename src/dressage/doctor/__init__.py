"""`dressage doctor`: what goes wrong silently in this field, looked at before it can.

A check is one function of what is examined; the tables stand at the ends of the files, by what they look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dressage.assemble import Records, Rows
from dressage.data.template import ChatTemplate
from dressage.doctor import learning, models, run, text
from dressage.doctor.check import Check, Finding
from dressage.doctor.subject import Learning, Subject, Text
from dressage.errors import DressageError

CHECKS: tuple[Check, ...] = tuple(
    sorted((*text.CHECKS, *models.CHECKS, *learning.CHECKS, *run.CHECKS), key=lambda check: check.number)
)
GLANCED_AT = 32
"""Rows that the short form looks at."""


@dataclass(frozen=True)
class Diagnosis:
    """A check and what it found, in how many seconds."""

    check: Check
    finding: Finding
    seconds: float


def examine(
    subject: Subject, checks: Iterable[Check] = CHECKS, told: Callable[[Check], object] = lambda check: None
) -> list[Diagnosis]:
    """Every check, in order; `told` hears of each before it begins. What breaks under a check is a fault."""
    results = []
    for check in checks:
        told(check)
        began = time.perf_counter()
        try:
            finding = check.look(subject)
        except DressageError as error:
            finding = Finding("fault", str(error))
        except Exception as error:  # A broken part may break in any way; the other checks are still wanted.
            finding = Finding("fault", f"{type(error).__name__}: {str(error).strip()[:200]}")
        results.append(Diagnosis(check, finding, time.perf_counter() - began))
    return results


def report_of(target: str | None, subject: Subject, results: Iterable[Diagnosis]) -> dict[str, Any]:
    """The results for machines; levels are "ok", "warn", "fault" and "not applicable"."""
    rows = [
        {
            "number": one.check.number,
            "name": one.check.name,
            "verdict": one.finding.level,
            "evidence": one.finding.evidence,
            "remedy": one.check.remedy,
            "seconds": round(one.seconds, 3),
        }
        for one in results
    ]
    counts = {level: sum(row["verdict"] == level for row in rows) for level in ("fault", "warn")}
    return {"target": target, "model": subject.model.name, "stages": list(subject.stages), **counts, "checks": rows}


def glance(config: Learning, template: ChatTemplate, kind: Records, rows: Rows) -> tuple[str, ...]:
    """The short form, at the start of a training run: a line for each warning and fault, or one that all is well."""
    data = config.prompts if kind == "prompts" else config.data  # type: ignore[union-attr]
    count = min(GLANCED_AT, len(rows.train))
    seen = Text(kind, data, rows.train_records[:count], rows.train[:count], len(rows.train))
    subject = Subject({config.kind: config}, Path(), template, [seen], Path(), config.model)
    results = examine(subject, [check for check in CHECKS if check.brief])
    told = [
        f"doctor: {one.finding.level}: {one.check.name}: {one.finding.evidence}; {one.check.remedy}"
        for one in results
        if one.finding.level in ("warn", "fault")
    ]
    return tuple(told) or (f"doctor: {len(results)} quick checks, all well",)
