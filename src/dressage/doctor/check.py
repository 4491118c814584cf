"""What a check is, and what it may find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dressage.doctor.subject import Subject

Level = Literal["ok", "warn", "fault", "not applicable"]


@dataclass(frozen=True)
class Finding:
    """How it is, and the number that shows it."""

    level: Level
    evidence: str


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    number: int
    name: str
    look: Callable[[Subject], Finding]
    remedy: str
    """The setting to turn if it is not well."""
    brief: bool = False
    """Needs no weights and almost no time: looked at before every training run."""


def found(well: bool, evidence: str, otherwise: Level = "fault") -> Finding:
    """ok if it is well."""
    return Finding("ok" if well else otherwise, evidence)


def at_most(difference: float, limit: float, what: str) -> Finding:
    """ok up to the limit; a NaN is beyond it."""
    return found(difference <= limit, f"{what} differ by {difference:.1e} at most (limit {limit:.0e})")


def does_not_apply(why: str) -> Finding:
    """Nothing here that could be examined."""
    return Finding("not applicable", why)
