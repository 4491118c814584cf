"""docs/errors.md: the exit codes, and what is said of each case of the corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bad.case import Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def row(case: Case, said: str) -> str:
    return f"| {case.wrong} | `` {said.replace('|', chr(92) + '|')} `` |"


def page(kinds: Mapping[str, Sequence[Case]], said: Mapping[str, str]) -> str:
    return ""
