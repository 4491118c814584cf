"""What people said of answers, in a database: who, when, of which model, sampled how, with what consent."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import sqlalchemy as sql
from sqlalchemy import event, exc

from dressage.errors import DataError
from dressage.schema import Message

URL = "postgresql+psycopg://USER@HOST/NAME"
Said = Literal["ranking", "rating", "demonstration"]
"""Answers put in order; one found good or bad; the answer a person would have given."""
State = Literal["kept", "quarantined"]
"""Whether it may be exported: what is quarantined waits until somebody has looked at it."""


@dataclass(frozen=True)
class Feedback:
    """What one person said of the answers to one prompt."""

    kind: Said
    annotator: str
    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    """As the model gave them; of a demonstration, what the person wrote."""
    finished: tuple[bool, ...]
    """False where an answer was cut."""
    verdict: tuple[int, ...]
    """A rank for each answer, 0 the best; of a rating 1 for good, 0 for bad; of a demonstration nothing."""
    model: Mapping[str, Any]
    """Which weights answered: their name and SHA-256."""
    sampling: Mapping[str, Any]
    """How the answers were drawn."""
    consent: str
    """The words to which the person said yes."""
    reply: str
    """What the server called these answers."""
    number: int = 0
    """Which of them a rating or a demonstration speaks of."""
    state: State = "kept"
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    """32 hexadecimal digits that nobody can guess: who has them may withdraw what was said."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """UTC."""


_TABLE = sql.Table(
    "feedback",
    sql.MetaData(),
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("created", sql.String(32), nullable=False),
    sql.Column("annotator", sql.String(64), nullable=False, index=True),
    sql.Column("kind", sql.String(16), nullable=False),
    sql.Column("state", sql.String(16), nullable=False),
    sql.Column("consent", sql.Text, nullable=False),
    *(sql.Column(name, sql.JSON, nullable=False) for name in ("prompt", "answers", "finished", "verdict")),
    *(sql.Column(name, sql.JSON, nullable=False) for name in ("model", "sampling")),
    sql.Column("reply", sql.String(64), nullable=False),
    sql.Column("number", sql.Integer, nullable=False),
    # Nobody says two things of one answer: who has changed their mind takes back the first.
    sql.UniqueConstraint("reply", "number", "kind", "annotator"),
)


class FeedbackStore:
    """One table. Each change is a transaction of its own: it is on the disk, or it did not happen."""

    def __init__(self, url: sql.URL, name: str, make: bool) -> None:
        self.name = name
        """As errors call it: without a password."""
        with self._telling():
            # A connection for each use: a file that was moved or came back is the one that is meant.
            self._engine = sql.create_engine(url, hide_parameters=True, poolclass=sql.NullPool)
            if url.get_backend_name() == "sqlite":
                event.listen(self._engine, "connect", _overwrite_what_is_deleted)
            if make:
                _TABLE.create(self._engine, checkfirst=True)
            elif not sql.inspect(self._engine).has_table(_TABLE.name):
                raise DataError(f"{name}: no feedback here; `dressage serve MODEL --feedback {name}` collects some")

    def add(self, feedback: Feedback) -> bool:
        """Keep it; False if the same person has said something of this answer. DataError if the database cannot."""
        row = {column.name: getattr(feedback, column.name) for column in _TABLE.columns}
        row["prompt"] = [{"role": message.role, "content": message.content} for message in feedback.prompt]
        with self._telling():
            try:
                with self._engine.begin() as connection:
                    connection.execute(_TABLE.insert().values(row))
            except exc.IntegrityError:
                return False
        return True

    def read(self, *, state: State | None = None, annotator: str | None = None) -> Iterator[Feedback]:
        """All that was said, the oldest first."""
        wanted = {"state": state, "annotator": annotator}
        where = [_TABLE.c[name] == value for name, value in wanted.items() if value is not None]
        asked = _TABLE.select().where(*where).order_by(_TABLE.c.created, _TABLE.c.id)
        with self._telling(), self._engine.connect() as connection:
            for row in connection.execution_options(yield_per=500).execute(asked).mappings():
                yield _feedback(dict(row), self.name)

    def move(self, state: State, *, ids: Sequence[str] = (), annotator: str | None = None) -> int:
        """Into quarantine or out of it, by what it is or by who said it; returns how many were not there before."""
        changed = _TABLE.update().where(_which(ids, annotator), _TABLE.c.state != state).values(state=state)
        return self._change(changed)

    def delete(self, *, ids: Sequence[str] = (), annotator: str | None = None) -> int:
        """Delete for good; returns how many. SQLite overwrites what it deletes."""
        return self._change(_TABLE.delete().where(_which(ids, annotator)))

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _change(self, statement: Any) -> int:
        with self._telling(), self._engine.begin() as connection:
            return connection.execute(statement).rowcount

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Within, what a database complains of becomes a line."""
        try:
            yield
        except (exc.SQLAlchemyError, ImportError, UnicodeError) as error:
            cause = getattr(error, "orig", None) or error
            raise DataError(f"{self.name}: {' '.join(str(cause).split())[:200]}") from error


def open_store(place: str, *, make: bool = False) -> FeedbackStore:
    """A store in a SQLite file, made if asked for, or in the database of a URL such as postgresql+psycopg://HOST/NAME.

    Raises: DataError if there is none, or if it cannot be opened.
    """
    if "://" not in place:
        path = Path(place)
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # what people said is not for all users of the machine
        elif not path.exists():
            raise DataError(f"{place}: no feedback here; `dressage serve MODEL --feedback {place}` collects some")
        return FeedbackStore(sql.URL.create("sqlite", database=str(path)), place, make)
    try:
        url = sql.make_url(place)
    except (exc.ArgumentError, ValueError) as error:
        raise DataError(f"the feedback's place is no URL of a database; write it {URL}") from error
    if url.get_backend_name() == "sqlite":
        return open_store(url.database or "", make=make)
    return FeedbackStore(url, url.set(query={}).render_as_string(hide_password=True), make)


def rows_of(kind: Said, records: Iterable[Feedback]) -> Iterator[dict[str, Any]]:
    """Those of one kind, as rows that stages read, with all that is known about each."""
    for one in records:
        if one.kind != kind:
            continue
        prompt = [{"role": message.role, "content": message.content} for message in one.prompt]
        if kind == "ranking":
            told: dict[str, Any] = {
                "prompt": prompt,
                "answers": one.answers,
                "ranks": one.verdict,
                "finished": one.finished,
            }
        elif kind == "rating":
            told = {"prompt": prompt, "completion": one.answers[0], "label": one.verdict[0] == 1}
            told |= {"finished": one.finished[0]}
        else:
            told = {"messages": [*prompt, {"role": "assistant", "content": one.answers[0]}]}
        known = ("annotator", "created", "model", "sampling", "reply", "consent", "id")
        yield told | {name: getattr(one, name) for name in known} | {"simulated": False}


def _feedback(row: Mapping[str, Any], place: str) -> Feedback:
    try:
        if row["kind"] not in get_args(Said) or row["state"] not in get_args(State):
            raise ValueError("kind or state unknown")
        prompt = tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"])
        lists = {name: tuple(row[name]) for name in ("answers", "finished", "verdict")}
        return Feedback(**{**row, **lists, "prompt": prompt})
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{place}: record {str(row['id'])[:40]} is damaged ({error}); delete it") from error


def _which(ids: Sequence[str], annotator: str | None) -> Any:
    return _TABLE.c.id.in_(ids) if annotator is None else _TABLE.c.annotator == annotator


def _overwrite_what_is_deleted(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA secure_delete = ON")
