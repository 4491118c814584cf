"""`dressage serve` as tests run it: a real server on a real socket, asked byte by byte."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TOKEN = "another-token-of-the-tests-987654"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    def events(self) -> list[Any]:
        """Of a stream, but for the mark of its end."""
        lines = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@dataclass(frozen=True)
class Served:
    port: int
    token: str
    store: Any = None
    desk: Any = None
    server: Any = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str | None] | None = None
    ) -> Reply:
        """A request with the token, unless the headers say otherwise (None: left out); a dict goes as JSON."""
        content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        if content is not None and not isinstance(content, bytes):
            content = json.dumps(content).encode()
        sent = {"Host": self.host, "Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        if content is not None:
            sent["Content-Length"] = str(len(content))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in (sent | dict(headers or {})).items():
                if value is not None:
                    connection.putheader(name, value.encode("latin-1"))
            with suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough, and said so
                connection.endheaders(content)
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read().decode())
        finally:
            connection.close()


@contextmanager
def serving(
    model: Path, place: Path | None, *, token: str = TOKEN, guard: Mapping[str, Any] | None = None, **desk: Any
) -> Iterator[Served]:
    """Serve a model's folder; `desk` are fields of the desk, `guard` of what stands before it."""
    for name in ("starlette", "uvicorn", "sqlalchemy"):
        pytest.importorskip(name)
    from dataclasses import replace

    from dressage.assemble import build_speaker
    from dressage.feedback.store import open_store
    from dressage.schema import Sampling
    from dressage.serving.desk import Desk
    from dressage.serving.server import Service, guarded

    speaker = build_speaker(str(model))
    store = None if place is None else open_store(str(place), make=True)
    state, buffer = desk.pop("arriving", "kept"), desk.pop("buffer", None)
    fields = {"engine": speaker.engine, "sampling": Sampling(32)} | desk
    made = Desk(template=speaker.template, model={"name": "tiny", "sha256": "0" * 64}, **fields)
    server = guarded(Service(made, store, state), token=token, hosts=("127.0.0.1", "localhost", "::1"))
    if guard:
        server.config.app = replace(server.config.app, **guard)
    listening = socket.create_server(("127.0.0.1", 0))
    if buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Served(listening.getsockname()[1], token, store, made, server)
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
        if store is not None:
            store.close()
