"""The store of what people said: nothing lost, nothing kept that was taken back, and stages read what it exports."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from dressage.data.sources import read_demonstrations, read_rankings, read_ratings
from dressage.errors import DataError
from dressage.feedback.store import Feedback, FeedbackStore, open_store
from dressage.schema import Demonstration, Message, Ranking, Rating

ASKED = (Message("system", "Be brief.\n"), Message("user", " What is 2 + 2? 二加二? "))
RANKED = Feedback(
    kind="ranking",
    annotator="Anna",
    prompt=ASKED,
    answers=("Four.", "Five, said the secret fox"),
    finished=(True, False),
    verdict=(0, 1),
    model={"name": "runs/ppo/policy", "sha256": "ab" * 32},
    sampling={"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "seed": 5},
    consent="Yes, for training.",
    reply="chatcmpl-0",
)
RATED = replace(RANKED, id="1" * 32, kind="rating", answers=("Five",), finished=(False,), verdict=(0,), annotator="Bo")
WRITTEN = replace(RANKED, id="2" * 32, kind="demonstration", answers=("It is four.",), finished=(True,), verdict=())
ALL = (RANKED, RATED, WRITTEN)
Command = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "feedback.db"


@pytest.fixture
def store(place: Path) -> Iterator[FeedbackStore]:
    store = open_store(str(place), make=True)
    for one in ALL:
        store.add(one)
    yield store
    store.close()


def test_what_was_said_comes_back_whole(store: FeedbackStore, place: Path) -> None:
    again = open_store(str(place))
    assert {one.id: one for one in again.read()} == {one.id: one for one in ALL}
    again.close()


def test_every_record_says_who_when_which_and_with_what_consent(store: FeedbackStore) -> None:
    for one in store.read():
        assert one.annotator and one.consent and one.model["sha256"] and one.sampling["temperature"] == 0.7
        assert one.created.endswith("+00:00") and one.created[:2] == "20"
        assert len(one.id) == 32


def test_two_records_have_two_names() -> None:
    made = replace(RANKED, id=Feedback.__dataclass_fields__["id"].default_factory())  # type: ignore[misc]
    assert made.id != RANKED.id


def test_stages_read_what_is_exported(store: FeedbackStore, place: Path, tmp_path: Path, dressage: Command) -> None:
    for kind in ("rankings", "ratings", "demonstrations"):
        ran = dressage("feedback", "export", kind, place, "--out", tmp_path / "out" / f"{kind}.jsonl")
        assert ran.exit_code == 0 and ran.stdout.startswith("1 "), ran.output
    (ranking,) = read_rankings(str(tmp_path / "out/rankings.jsonl")).records
    # To the letter, with the white space that somebody wrote.
    assert (ranking.prompt.messages, ranking.answers, ranking.ranks, ranking.finished) == (
        ASKED, RANKED.answers, (0, 1), (True, False),
    )  # fmt: skip
    assert isinstance(ranking, Ranking)
    (rating,) = read_ratings(str(tmp_path / "out/ratings.jsonl")).records
    assert (rating.answer, rating.good, rating.finished) == ("Five", False, False) and isinstance(rating, Rating)
    (shown,) = read_demonstrations(str(tmp_path / "out/demonstrations.jsonl")).records
    assert isinstance(shown, Demonstration) and shown.messages[-1] == Message("assistant", "It is four.")
    row = json.loads((tmp_path / "out/rankings.jsonl").read_text(encoding="utf-8"))
    assert row["annotator"] == "Anna" and row["consent"] == RANKED.consent and row["simulated"] is False
    assert row["model"] == RANKED.model and row["sampling"] == RANKED.sampling and row["created"] == RANKED.created


def test_quarantine_keeps_back_until_released(
    store: FeedbackStore, place: Path, tmp_path: Path, dressage: Command
) -> None:
    out = tmp_path / "rankings.jsonl"
    assert dressage("feedback", "quarantine", place, "--annotator", "Anna").stdout == "2 put into quarantine\n"
    listed = dressage("feedback", "list", place).stdout
    assert "1 x rating" in listed and "1 x ranking in quarantine" in listed and RANKED.id in listed
    ran = dressage("feedback", "export", "rankings", place, "--out", out)
    assert ran.exit_code == 2 and "no rankings to export" in ran.stderr and not out.exists()
    assert dressage("feedback", "release", place, "--id", RANKED.id).stdout == "1 released\n"
    assert dressage("feedback", "release", place, "--id", RANKED.id).stdout == "0 released\n"
    assert dressage("feedback", "export", "rankings", place, "--out", out).exit_code == 0
    assert [one.state for one in store.read() if one.id == WRITTEN.id] == ["quarantined"]


def test_what_is_deleted_is_gone_from_the_disk(store: FeedbackStore, place: Path, dressage: Command) -> None:
    secret = b"the secret fox"
    assert secret in place.read_bytes()
    assert dressage("feedback", "delete", place, "--annotator", "Anna").exit_code == 2  # without --yes
    assert len(list(store.read())) == 3
    assert dressage("feedback", "delete", place, "--annotator", "Anna", "--yes").stdout.startswith("2 deleted")
    assert [one.annotator for one in store.read()] == ["Bo"]
    assert not any(secret in path.read_bytes() for path in place.parent.iterdir())


def test_a_list_does_not_steer_the_terminal(store: FeedbackStore, place: Path, dressage: Command) -> None:
    wild = replace(
        RANKED, id="3" * 32, annotator="[red]Eve\x1b[2J", prompt=(Message("user", "\x1b]0;title\x07 [b]hi"),)
    )
    store.add(wild)
    listed = dressage("feedback", "list", place).stdout
    assert "\x1b" not in listed and "\x07" not in listed and "[red]Eve" in listed


def test_a_record_that_somebody_changed_is_named(store: FeedbackStore, place: Path) -> None:
    import sqlite3

    with sqlite3.connect(place) as connection:
        connection.execute("update feedback set prompt = '[7]' where id = ?", (RATED.id,))
    connection.close()
    with pytest.raises(DataError, match=f"{RATED.id} is damaged"):
        list(store.read())
    assert store.delete(ids=[RATED.id]) == 1


def test_looking_changes_nothing(tmp_path: Path, dressage: Command) -> None:
    import sqlite3

    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("create table mine (a)")
    connection.close()
    before = other.read_bytes()
    for place in (other, f"sqlite:///{other}", tmp_path / "new.db", f"sqlite:///{tmp_path}/new.db"):
        ran = dressage("feedback", "list", place)
        assert ran.exit_code == 2 and "no feedback here" in ran.stderr
    assert other.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["other.db"]


def test_it_is_not_for_all_users_of_the_machine(store: FeedbackStore, place: Path) -> None:
    assert place.stat().st_mode & 0o077 == 0


def test_an_export_follows_a_link_and_spares_what_is_no_file(
    store: FeedbackStore, place: Path, tmp_path: Path, dressage: Command
) -> None:
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert dressage("feedback", "export", "rankings", place, "--out", tmp_path / "link.jsonl").exit_code == 0
    assert (tmp_path / "link.jsonl").is_symlink() and "Four." in (tmp_path / "real.jsonl").read_text(encoding="utf-8")
    ran = dressage("feedback", "export", "rankings", place, "--out", tmp_path)
    assert ran.exit_code == 2 and f"--out {tmp_path}: is there and is no file" in ran.stderr


def test_a_password_is_not_told() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(DataError) as failed:
        open_store("postgresql+psycopg://me:hunter2@127.0.0.1:1/feedback")
    assert "hunter2" not in str(failed.value) and "\n" not in str(failed.value)
    with pytest.raises(DataError) as failed:
        open_store("postgresql+psycopg://127.0.0.1:1/feedback?user=me&password=hunter2")
    assert "hunter2" not in str(failed.value)


def test_two_processes_at_once_lose_nothing(place: Path) -> None:
    """Two writers of one SQLite file wait for one another."""
    import threading

    stores = [open_store(str(place), make=True) for _ in range(2)]

    def write(number: int) -> None:
        for count in range(20):
            stores[number].add(replace(RANKED, id=f"{number}-{count}", number=100 * number + count))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(stores[0].read())) == 40
    for store in stores:
        store.close()


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server of this test's own."""
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    import os
    import tempfile

    # It does not run as root.
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if user:
        shutil.chown(folder, "postgres")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **user}
    subprocess.run([found[-1], "-D", folder / "data", "-A", "trust", "-U", "tester"], check=True, **options)
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    server = subprocess.Popen([found[-1].with_name("postgres"), "-D", "data", "-p", str(port), *settings], **options)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        time.sleep(0.3)
        yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def test_the_same_in_postgresql(postgres: str, tmp_path: Path, dressage: Command) -> None:
    store = open_store(postgres, make=True)
    for one in ALL:
        store.add(one)
    assert {one.id: one for one in store.read()} == {one.id: one for one in ALL}
    assert dressage("feedback", "quarantine", postgres, "--annotator", "Bo").stdout == "1 put into quarantine\n"
    ran = dressage("feedback", "export", "rankings", postgres, "--out", tmp_path / "rankings.jsonl")
    assert ran.exit_code == 0 and len(read_rankings(str(tmp_path / "rankings.jsonl")).records) == 1
    assert dressage("feedback", "delete", postgres, "--id", RANKED.id, "--id", WRITTEN.id, "--yes").exit_code == 0
    assert [one.annotator for one in store.read()] == ["Bo"]
    store.close()
