"""The verbs that meet people: a server of a model, and what they said of its answers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer
from rich.console import Console

from dressage.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dressage.feedback.store import FeedbackStore, Said

TOKEN_VARIABLE = "DRESSAGE_TOKEN"
SHORTEST_TOKEN = 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("", "0.0.0.0", "::")
STORE = "runs/feedback.db"

feedback = typer.Typer(no_args_is_help=True, help="What people said of answers: look at it, export it, delete it.")
Store = Annotated[str, typer.Argument(metavar="[STORE]", help="A file, or a database's URL.")]
Ids = Annotated[list[str] | None, typer.Option("--id", help="This record; may be given several times.")]
Annotator = Annotated[str | None, typer.Option("--annotator", help="All that this person said.")]


class Which(TypedDict):
    """Records by what they are called, or by who said them."""

    ids: Sequence[str]
    annotator: str | None


class Kind(StrEnum):
    """What can be exported, by the names of what stages read."""

    rankings = "rankings"
    ratings = "ratings"
    demonstrations = "demonstrations"


def serve(
    model: Annotated[str, typer.Argument(help='A folder with a model or an adapter, a hub name, or "packaged".')],
    system: Annotated[str | None, typer.Option("--system", help="How the model is to behave.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=10, help="Unless asked otherwise.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
    seconds: Annotated[float, typer.Option("--seconds", min=1, max=3600, help="Longest time for an answer.")] = 120,
    votes: Annotated[
        str, typer.Option("--feedback", help='Where votes are kept: a file, a database\'s URL, or "none".')
    ] = STORE,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="New votes wait for `dressage feedback release`.")
    ] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: one that is free.")] = 8420,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = LOOPBACK[0],
    expose: Annotated[bool, typer.Option("--expose", help="Yes, other machines may reach it.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A further name by which it may be called.")
    ] = None,
) -> None:
    """A chat page with votes, and OpenAI's chat completions, for this machine's browsers and programs.

    Whoever has the token may ask; it is printed once, or taken from the environment variable DRESSAGE_TOKEN.
    """
    names = (*LOOPBACK, *(allow_host or ()))
    if host not in LOOPBACK:
        if not expose:
            raise ConfigError(f"--host {host}: other machines could reach it; --expose says that they may")
        if host in EVERYWHERE and not allow_host:
            raise ConfigError(f"--host {host}: say by --allow-host under which name or address browsers will call it")
        names = (*names, host)
    own = os.environ.get(TOKEN_VARIABLE)
    token = own or secrets.token_urlsafe(24)
    if not re.fullmatch(rf"[A-Za-z0-9_-]{{{SHORTEST_TOKEN},}}", token):
        raise ConfigError(f"{TOKEN_VARIABLE}: give {SHORTEST_TOKEN} or more letters and digits, - and _ among them")
    _need("starlette", "uvicorn", "sqlalchemy")
    from dressage.serving.guard import called

    for name in allow_host or ():
        try:
            called(name)
        except ValueError as error:
            raise ConfigError(
                f"--allow-host {name}: give a host's name or address alone, without port or ://"
            ) from error
    with contextlib.suppress(KeyboardInterrupt), _listening(host, port) as listening:
        with Console(highlight=False).status("loading the model"):
            from dressage.assemble import build_speaker
            from dressage.feedback.store import open_store
            from dressage.models.pretrained import PACKAGED, packaged_folder
            from dressage.pipeline import sha256
            from dressage.schema import Sampling
            from dressage.serving.desk import Desk
            from dressage.serving.server import Service, guarded

            speaker = build_speaker(model)
            store = None if votes == "none" else open_store(votes, make=True)
        sampling = Sampling(max_new_tokens, temperature=temperature)
        folder = packaged_folder() if model == PACKAGED else Path(model)
        known = {"name": model, "sha256": sha256(folder) if folder.is_dir() else None}
        desk = Desk(speaker.engine, speaker.template, sampling, known, system, seconds)
        service = Service(desk, store, arriving="quarantined" if quarantine else "kept")
        at = f"[{host}]" if ":" in host else "127.0.0.1" if host in EVERYWHERE else host
        address = f"http://{at}:{listening.getsockname()[1]}"
        shown = f"/#token={token}" if not own else f"/#token=... (yours, of {TOKEN_VARIABLE})"
        # Not through rich, which may break the line.
        typer.echo(f"chat page: {address}{shown}\nfor programs: {address}/v1, the token as the API key; Ctrl-C ends it")
        if store is not None:
            typer.echo(f"votes: {store.name}" + (", in quarantine until released" if quarantine else ""))
        if expose:
            told = "warning: what is said here, and the token, can be read on the way; put a proxy with TLS before it"
            typer.echo(told, err=True)
        guarded(service, token=token, hosts=names).run(sockets=[listening])


@feedback.command("list")
def list_feedback(place: Store = STORE, annotator: Annotator = None) -> None:
    """What there is, the oldest first: name, time (UTC), person, kind, verdict and question."""
    counts: Counter[str] = Counter()
    with _opened(place) as store:
        for one in store.read(annotator=annotator):
            what = one.kind if one.state == "kept" else f"{one.kind} in quarantine"
            counts[what] += 1
            verdict = " ".join(map(str, one.verdict))
            asked = one.prompt[-1].content if one.prompt else ""
            # A line for each, however wide the terminal, for grep and cut.
            typer.echo("  ".join(map(_plain, (one.id, one.created[:16], one.annotator, what, verdict, asked))))
    typer.echo(", ".join(f"{count} x {what}" for what, count in sorted(counts.items())) or "nothing yet")


@feedback.command("export")
def export_feedback(
    kind: Annotated[Kind, typer.Argument(help="What is wanted.")],
    place: Store = STORE,
    out: Annotated[Path | None, typer.Option("--out", help="The file; else KIND.jsonl.")] = None,
) -> None:
    """Write rows that `reward`, `dpo`, `sft` and `quickstart --rankings` read. What is in quarantine stays there."""
    from dressage.monitor.writers import write_whole

    path = out or Path(f"{kind.value}.jsonl")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--out {path}: is there and is no file; give the name of one")
    with _opened(place) as store:
        from dressage.feedback.store import rows_of

        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(_said(kind), store.read(state="kept"))]
    if not rows:
        raise DataError(f"{store.name}: no {kind.value} to export; `dressage feedback list` shows what there is")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.resolve(), "".join(rows))  # what a link points to, not the link
    typer.echo(f"{len(rows)} {kind.value} -> {path}")


@feedback.command("quarantine")
def quarantine_feedback(place: Store = STORE, ids: Ids = None, annotator: Annotator = None) -> None:
    """Keep records from being exported until they are released."""
    with _opened(place) as store:
        typer.echo(f"{store.move('quarantined', **_which(ids, annotator))} put into quarantine")


@feedback.command("release")
def release_feedback(place: Store = STORE, ids: Ids = None, annotator: Annotator = None) -> None:
    """Out of quarantine."""
    with _opened(place) as store:
        typer.echo(f"{store.move('kept', **_which(ids, annotator))} released")


@feedback.command("delete")
def delete_feedback(
    place: Store = STORE,
    ids: Ids = None,
    annotator: Annotator = None,
    yes: Annotated[bool, typer.Option("--yes", help="Really: it cannot be brought back.")] = False,
) -> None:
    """Delete for good. What was exported, and models that learnt it, are not changed."""
    which = _which(ids, annotator)
    if not yes:
        raise ConfigError("what is deleted cannot be brought back; give --yes too")
    with _opened(place) as store:
        deleted = store.delete(**which)
        if not deleted:
            raise DataError(f"{store.name}: nothing of the kind; `dressage feedback list` shows what there is")
        typer.echo(f"{deleted} deleted; export again, and train again what learnt from them")


def _said(kind: Kind) -> Said:
    return {Kind.rankings: "ranking", Kind.ratings: "rating", Kind.demonstrations: "demonstration"}[kind]  # type: ignore[return-value]


def _which(ids: Sequence[str] | None, annotator: str | None) -> Which:
    if bool(ids) == (annotator is not None):
        raise ConfigError("say which: --id ID (one or several), or --annotator NAME")
    return {"ids": ids or (), "annotator": annotator}


@contextlib.contextmanager
def _opened(place: str) -> Iterator[FeedbackStore]:
    _need("sqlalchemy")
    from dressage.feedback.store import open_store

    store = open_store(place)
    try:
        yield store
    finally:
        store.close()


def _need(*modules: str) -> None:
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)}: not installed; pip install 'dressage[serve]'")


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at this address, so that one which is taken is told before a model is loaded."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{host}:{port}: cannot listen there ({why}); take another --port") from error
    with listening:
        yield listening


def _plain(text: str) -> str:
    """What people wrote does not steer the terminal."""
    told = "".join(letter if letter.isprintable() else " " for letter in text)
    return told if len(told) <= 60 else f"{told[:57]}..."
