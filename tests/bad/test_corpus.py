"""Whatever a user gets wrong: a line or two on stderr that name it, exit code 2, and nothing written.

The messages are the catalogue of docs/errors.md, which `make docs` writes from here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bad import command_line, data, models, recipes, requests, rewards
from bad.case import Case
from bad.page import PAGE, page, row
from bad.requests import ASK, HELLO, TOKEN, Asked
from server import Served, serving

KINDS = {
    "The command line": command_line.CASES,
    "Recipes and settings": recipes.CASES,
    "Data": data.CASES,
    "Models, adapters and checkpoints": models.CASES,
    "Rewards": rewards.CASES,
}
CASES = [case for cases in KINDS.values() for case in cases]
ALL = {**KINDS, "Requests to `dressage serve`": requests.CASES}
Command = Callable[..., Any]
said: dict[str, str] = {}


def test_there_are_as_many_as_we_say() -> None:
    assert len(CASES) >= 250
    assert [
        name for name, count in Counter(case.wrong for cases in ALL.values() for case in cases).items() if count > 1
    ] == []


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of bad replies: the path says which."""
    whole: dict[str, bytes] = {
        "/text": b"<html>Not here</html>",
        "/bytes": b"\xff\xfe\x00",
        "/deep": b"[" * 100_000,
        "/list": b"[1, 2]",
        "/empty": b"",
        "/few": b'{"rewards": [1]}',
        "/words": b'{"rewards": ["good", "bad"]}',
        "/nan": b'{"rewards": [NaN, NaN]}',
        "/null": b'{"rewards": [null, null]}',
        "/long": b" " * (17 << 20),
        "/chat": json.dumps({"choices": [{"message": {"content": "7"}}]}).encode(),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/gone":
                return
            if self.path == "/noise":
                self.wfile.write(b"\x00\x01\x02 hello\r\n\r\n")
                return
            code = 302 if self.path == "/redirect" else int(self.path[1:]) if self.path[1:].isdigit() else 200
            self.send_response(code)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            try:
                for _ in range(60 if self.path == "/slow" else 0):
                    self.wfile.write(b" ")
                    time.sleep(0.02)
                self.wfile.write(whole.get(self.path, b""))
            except OSError:
                pass  # the other side has gone

        def log_message(self, *_: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def contents(place: Path) -> dict[str, bytes]:
    """All that lies in a folder; what is linked there is not its own."""
    found = {}
    for folder, folders, names in os.walk(place):
        for name in [*folders, *names]:
            path = Path(folder, name)
            found[str(path.relative_to(place))] = path.read_bytes() if path.is_file() else b""
    return found


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """What never ends fails."""

    def late(*_: Any) -> None:
        raise AssertionError("no end in sight")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.wrong)
def test_a_wrong_command(
    case: Case, dressage: Command, ready: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BROKEN_KEY", "sk-secret\n")
    (tmp_path / "tiny").symlink_to(ready / "tiny")
    if "made/" in case.command:
        shutil.copytree(ready / "made", tmp_path / "made")
    for name, content in case.files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        written = content() if callable(content) else content
        path.write_bytes(written.encode() if isinstance(written, str) else written)
    if case.before is not None:
        case.before(tmp_path)
    before = contents(tmp_path)

    ran = dressage(*shlex.split(case.command.replace("SERVER", server)))

    message = "\n".join(line for line in ran.stderr.splitlines() if not line.startswith("warning: "))
    assert ran.exit_code == 2, ran.output + repr(ran.exception)
    assert 1 <= len(message.splitlines()) <= 2 and "Traceback" not in ran.output, ran.output
    assert all(line.startswith("error: ") and len(line) < 600 and line.isprintable() for line in message.splitlines())
    for name in case.names:
        assert name in message.replace(server, "SERVER"), message
    assert "sk-secret" not in ran.output and ":secret@" not in ran.output
    after = contents(tmp_path)
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} <= {*case.changes}
    told = message.replace(server, "SERVER").replace(str(tmp_path), "…")
    said[case.wrong] = told
    if not case.theirs and "DRESSAGE_WRITE_DOCS" not in os.environ:
        assert row(case, told) in PAGE.read_text(encoding="utf-8"), "write docs/errors.md again with `make docs`"


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real server of the small model, and an answer with two texts that it gave."""
    with serving(tiny_model, tmp_path_factory.mktemp("served") / "feedback.db", token=TOKEN) as served:
        yield served


@pytest.fixture(scope="module")
def answer(served: Served) -> str:
    whole = served.ask("POST", ASK, HELLO | {"n": 2})
    assert whole.status == 200
    return str(whole.json()["id"])


@pytest.mark.parametrize("asked", requests.CASES, ids=lambda asked: asked.wrong)
def test_a_wrong_request(asked: Asked, served: Served, answer: str) -> None:
    body = asked.body
    if isinstance(body, dict | list | int):
        body = json.dumps(body).replace("ANSWER", answer)
    headers = {name: value and value.replace("SERVER", served.host) for name, value in asked.headers.items()}

    reply = served.ask(asked.method, asked.path, body, headers)

    assert reply.status == asked.status, reply.text
    error = reply.json()["error"]
    assert error["code"] == asked.status and reply.json().keys() == {"error"}
    message = error["message"]
    assert len(message) < 400 and message.isprintable() and "Traceback" not in message
    for name in asked.names:
        assert name in message, message
    assert TOKEN not in reply.text and "script-src 'self'" in reply.headers["content-security-policy"]
    assert list(served.store.read()) == []
    said[asked.wrong] = f"{asked.status}: {message}"
    if not asked.theirs and "DRESSAGE_WRITE_DOCS" not in os.environ:
        assert row(asked, said[asked.wrong]) in PAGE.read_text(encoding="utf-8"), "write docs/errors.md again"


def test_the_catalogue_is_of_these_cases() -> None:
    if "DRESSAGE_WRITE_DOCS" in os.environ:
        assert said.keys() == {case.wrong for cases in ALL.values() for case in cases}
        PAGE.write_text(page(ALL, said), encoding="utf-8")
    written = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| (.*?) \| ``", written, re.MULTILINE) == [
        case.wrong for cases in ALL.values() for case in cases
    ]
