"""What a case of the corpus is: a command that a user got wrong, and what must be said of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Content = str | bytes | Callable[[], bytes]


@dataclass(frozen=True)
class Case:
    """A wrong command. It is run in a folder of its own, which must be as it was afterwards."""

    wrong: str
    """What is wrong, for people: a row of docs/errors.md."""
    command: str
    """What follows `dressage`, written as for a shell. SERVER stands for the address of a server that misbehaves."""
    names: tuple[str, ...]
    """What the error must name: where it is, what it is, what to do."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """What lies in the folder, beside `tiny`, a model, and `made`, what the stages make of it."""
    before: Callable[[Path], object] | None = None
    """What is done to the folder first."""
    theirs: bool = False
    """The message ends in a library's words, which change with its version."""
    changes: tuple[str, ...] = ()
    """Files in which it is written that the command was tried."""


def lines(*rows: object) -> bytes:
    """Rows as JSON lines; texts and bytes are lines as they are."""
    written = (row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False) for row in rows)
    return b"".join((row if isinstance(row, bytes) else _utf8(row)) + b"\n" for row in written)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a character can only be written as an escape
        return json.dumps(json.loads(text)).encode()
