"""Files and hub names -> records. What a file holds is told from its content; every row left out is accounted for."""

from __future__ import annotations

import gzip
import json
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, Literal, TypeVar, cast

from dressage.data.formats import FORMATS, Format
from dressage.data.parsers import aimed
from dressage.data.values import BadRow
from dressage.errors import DataError
from dressage.schema import Demonstration, Prompt, Ranking, Rating

Record = TypeVar("Record", Demonstration, Ranking, Rating, Prompt)
Kept = TypeVar("Kept")
OnBadRow = Literal["error", "drop"]
Kind = Literal["demonstrations", "rankings", "ratings", "prompts"]

_PROBED_ROWS = 100
_SHOWN_COLUMNS = 12
_COMPARED_COLUMNS = 50


@dataclass(frozen=True)
class Dropped:
    """A row that was left out."""

    where: str  # "file:line"; the number of the row in a JSON list, Parquet file or hub set
    reason: str


@dataclass(frozen=True)
class Loaded(Generic[Kept]):
    """The records of a source, in its order, and what was left out of it."""

    records: tuple[Kept, ...]
    format: str
    rows: int
    """Rows read; a row may hold several records."""
    dropped: tuple[Dropped, ...]

    def summary(self) -> str:
        """A line for people: what was read, what was left out and why."""
        return f"{len(self.records)} records of {self.rows} rows ({self.format})" + reasons(self.dropped)


def reasons(dropped: Iterable[Dropped]) -> str:
    """'; left out 3: 2 not valid JSON, 1 duplicate', or nothing."""
    counts = Counter(row.reason for row in dropped)
    if not counts:
        return ""
    return f"; left out {counts.total()}: " + ", ".join(f"{n} {reason}" for reason, n in counts.most_common())


def read_demonstrations(
    source: str, *, on_bad_row: OnBadRow = "error", limit: int | None = None
) -> Loaded[Demonstration]:
    """Conversations to imitate, at most `limit`; a broken row is a DataError or left out, a duplicate is left out."""
    return cast(Loaded[Demonstration], _read(source, "demonstrations", on_bad_row, limit))


def read_rankings(
    source: str, *, on_bad_row: OnBadRow = "error", limit: int | None = None, repeated: bool = False
) -> Loaded[Ranking]:
    """Ranked answers, at most `limit`; left out are duplicates and rankings whose answers are all the same.

    With `repeated` a ranking that stands there again is another judgement, and stays.
    """
    return cast(Loaded[Ranking], _read(source, "rankings", on_bad_row, limit, repeated))


def read_ratings(source: str, *, on_bad_row: OnBadRow = "error", limit: int | None = None) -> Loaded[Rating]:
    """Answers judged one by one, at most `limit`; rankings give their best and their worst answers."""
    return cast(Loaded[Rating], _read(source, "ratings", on_bad_row, limit))


def read_prompts(source: str, *, on_bad_row: OnBadRow = "error", limit: int | None = None) -> Loaded[Prompt]:
    """What is to be answered, at most `limit`, each once, with its target where the row has one (as GSM8K's answer).

    Demonstrations and rankings give their prompts.
    """
    return cast(Loaded[Prompt], _read(source, "prompts", on_bad_row, limit))


def _read(source: str, kind: Kind, on_bad_row: OnBadRow, limit: int | None, repeated: bool = False) -> Loaded[Any]:
    rows = _rows(source)
    head = list(islice(rows, _PROBED_ROWS))
    form = _recognise(source, kind, [row for _, row in head])
    parse = aimed(form.prompts) if kind == "prompts" else getattr(form, kind)
    records: list[object] = []
    seen: set[object] = set()
    dropped: list[Dropped] = []
    count = 0
    for where, row in chain(head, rows):
        if limit is not None and len(records) >= limit:
            break
        count += 1
        try:
            found = list(parse(_checked(row, form)))
        except BadRow as bad:
            if on_bad_row == "error":
                raise DataError(f"{where}: {bad}; set data.on_bad_row=drop to leave such rows out") from None
            dropped.append(Dropped(where, bad.reason))
            continue
        if not found:
            dropped.append(Dropped(where, f"no {kind} in it"))
        for record in found:
            if isinstance(record, Ranking) and len(set(record.answers)) == 1:
                dropped.append(Dropped(where, "all answers the same"))
            elif record in seen and not repeated:
                dropped.append(Dropped(where, "duplicate"))
            elif limit is None or len(records) < limit:
                records.append(record)
                seen.add(record)
    return Loaded(tuple(records), form.name, count, tuple(dropped))


def _checked(row: object, form: Format) -> dict[str, Any]:
    if isinstance(row, BadRow):
        raise row
    fields = _fields(row)
    missing = sorted(form.columns - fields.keys())
    if missing:
        raise BadRow(f"no column {missing[0]!r}")
    return fields


def _fields(row: object) -> dict[str, Any]:
    """The columns of a row; a bare text is a row with the one column `text`."""
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, dict):
        return row
    raise BadRow("neither an object nor a text")


def _recognise(source: str, kind: Kind, head: list[object]) -> Format:
    """The format that most of these rows have; DataError if it is unknown or cannot give the kind asked for."""
    if not head:
        raise DataError(f"{source}: has no rows; give a file with one JSON object a line")
    columns = [frozenset(_fields(row)) for row in head if isinstance(row, dict | str)]
    if not columns:
        broken = next((str(row) for row in head if isinstance(row, BadRow)), "neither objects nor texts")
        raise DataError(f"{source}:1: {broken}; give JSON, one object a line or all in a list, or Parquet")
    form = Counter(_fitting(names) for names in columns).most_common(1)[0][0]
    if form is not None and getattr(form, kind) is not None:
        return form
    names = Counter(columns).most_common(1)[0][0]
    compared = sorted(names)[:_COMPARED_COLUMNS]
    known = "are no known format" if form is None else f"are '{form.name}', which has no {kind}"
    nearest = max((form for form in FORMATS if getattr(form, kind)), key=lambda form: _likeness(form, compared))
    raise DataError(
        f"{source}: columns {_list(names)} {known}; the nearest that has {kind}, '{nearest.name}', "
        f"also needs {_list(nearest.columns - names)}"
    )


def _fitting(columns: frozenset[str]) -> Format | None:
    return next((form for form in FORMATS if form.columns <= columns), None)


def _likeness(form: Format, names: Iterable[str]) -> float:
    """From 0 to 1: how much the format's columns look like these, a slip of the pen forgiven."""
    return fmean(max(SequenceMatcher(None, want, name).ratio() for name in {"", *names}) for want in form.columns)


def _list(names: Iterable[str]) -> str:
    written = sorted(" ".join(str(name).split())[:40] for name in names)
    more = [f"{len(written) - _SHOWN_COLUMNS} more"] if len(written) > _SHOWN_COLUMNS else []
    return ", ".join([*written[:_SHOWN_COLUMNS], *more])


# --- rows -------------------------------------------------------------------------------------------------------------

MARK = b"\xef\xbb\xbf"
"""With which Windows begins a file in UTF-8."""
Rows = Iterator[tuple[str, object]]
"""Where a row stands, and the row: a JSON value, or the BadRow that says why there is none."""

_DATA_SUFFIXES = (".json", ".jsonl", ".gz", ".parquet", ".csv", ".txt")
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<split>[\w.\[\]:%+-]+))?")


def _rows(source: str) -> Rows:
    try:
        path = Path(source).expanduser()
        found = path.stat().st_mode if path.exists() else None
    except (OSError, RuntimeError) as error:  # a name that no file can have, or the home of nobody
        raise DataError(f"{source[:80]}: no such file ({getattr(error, 'strerror', None) or error})") from error
    if found is not None and stat.S_ISREG(found):
        return _file_rows(path, source)
    if found is not None:
        raise DataError(f"{source}: is {'a folder' if stat.S_ISDIR(found) else 'no plain file'}; give one file")
    hub = _HUB_NAME.fullmatch(source)
    # "data/train.jsonl" has the form of a hub name too, but whoever writes it means a file.
    if hub is None or source.endswith(_DATA_SUFFIXES) or path.parent.is_dir():
        raise DataError(
            f"{source}: no such file; give a file, or a data set of the hub as owner/name or owner/name:split"
        )
    return _hub_rows(hub["name"], hub["split"] or "train")


def _file_rows(path: Path, source: str) -> Rows:
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PAR1":
            yield from _parquet_rows(path, source)
            return
        with gzip.open(path) if start[:2] == b"\x1f\x8b" else path.open("rb") as lines:
            first = next((line for line in lines if line.removeprefix(MARK).strip()), b"")
            lines.seek(0)
            if not first:
                return
            if first.removeprefix(MARK).lstrip().startswith(b"["):
                yield from _listed(lines.read(), source)
            else:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{source}:{number}", _value(line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source}: cannot be read ({error}); is it damaged or only half copied?") from error


def _value(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return BadRow("not valid JSON", f"{error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return BadRow("not valid JSON", "nested too deep")
    except ValueError as error:
        return BadRow("not valid JSON", str(error)[:80])


def _listed(content: bytes, source: str) -> Rows:
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); mend the list, "
            "or write one row a line so that broken rows can be left out"
        ) from error
    except (ValueError, RecursionError) as error:
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)[:80]
        raise DataError(f"{source}: not valid JSON ({said}); mend the list") from error
    for number, value in enumerate(values, start=1):
        yield f"{source}:{number}", value


def _parquet_rows(path: Path, source: str) -> Rows:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{source}: Parquet needs pyarrow; install it with: pip install 'dressage[hub]'") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{source}:{number}", row
    except arrow.ArrowException as error:
        raise DataError(f"{source}: not readable as Parquet ({str(error)[:120]}); is it damaged?") from error


def _hub_rows(name: str, split: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: no such file; to fetch it from the hub: pip install 'dressage[hub]'") from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises whatever its many back ends raise
        said = " ".join(str(error).split())[:160]
        raise DataError(f"{name}:{split}: no such file, and not to be had from the hub ({said})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{split}:{number}", row
