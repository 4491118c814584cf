"""docs/errors.md: the exit codes, and what is said of each case of the corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bad.case import Case
from bad.requests import Asked

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"

INTRODUCTION = """# Errors

What a user can put right is told in a line or two on stderr: where it is (a file and line, a setting, a folder), what
it is, and what to do. No traceback (`--debug` or `DRESSAGE_DEBUG=1` shows one), and nothing is written: what lay in a
folder lies there as before. A traceback without `--debug` is a fault of Dressage's; please report it.

| exit code | means |
|---|---|
| 0 | done; or skipped, because it was done before |
| 1 | `dressage doctor` found a fault; with a traceback: a fault of Dressage's own |
| 2 | something the user can put right: the command, a setting, a file, a model, a disk |
| 3 | a stage stopped itself because its numbers say that it does harm (`health.on_alarm`); its checkpoints stay |
| 130 | interrupted (Ctrl-C); the same command goes on from the last checkpoint |

Below, every wrong command that the tests try ([tests/bad](../tests/bad)), and what is said of it. Made by `make
docs`; a test compares. At the end are the requests that `dressage serve` turns away: there HTTP's number comes first,
and the line stands in the reply's `error.message`. SERVER is a server's address; what a library says may be worded
otherwise by its other versions.
"""


def row(case: Case | Asked, said: str) -> str:
    """A line of the table; a line break in a message is a blank."""
    told = " ".join(line.removeprefix("error: ") for line in said.splitlines()).replace("|", "\\|")
    return f"| {case.wrong} | `` {told} `` |"


def page(kinds: Mapping[str, Sequence[Case | Asked]], said: Mapping[str, str]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for kind, cases in kinds.items():
        rows = [row(case, said[case.wrong]) for case in cases]
        parts.append(
            "\n".join([f"## {kind}: {len(cases)}\n", "| what is wrong | what is said |", "|---|---|", *rows, ""])
        )
    return "\n".join(parts)
