"""Who may come in: what stands before a server's pages and answers, whatever they are."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

LARGEST_REQUEST = 2**18
"""Bytes of a request's body."""
LARGEST_HEAD = 2**14
"""Bytes of its first line and headers."""
SECONDS = 10.0
"""In which a request has to be there, head and body each."""
PAGES = ("/", "/chat.js", "/style.css")
"""What is shown without a token: it holds nothing that is anybody's."""
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]+)?", re.IGNORECASE)
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "connection": "close",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Refused(Exception):
    """A request that gets no answer but this."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status

    def told(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "code": self.status}}


@dataclass(frozen=True)
class Guard:
    """Lets a request pass that names this server, comes from its own page or from no page, and brings the token.

    Against a page of another site that sends its visitors' browsers here (Origin), also under a name of its own that it
    has pointed to this machine (Host), against guessing (the token, compared in constant time), and against requests
    without end. A whole body is read before anything is done with it.
    """

    app: ASGIApp
    token: str
    hosts: frozenset[str]
    """Names by which this server may be called, in lower case, without ports."""
    largest: int = LARGEST_REQUEST
    seconds: float = SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_raw(HEADERS)]
            async with asyncio.timeout(self.seconds):  # for whoever asks and does not read
                await send(message)

        try:
            self._admit(scope)
            body = await self._body(receive)
        except Refused as refused:
            more = {"www-authenticate": "Bearer"} if refused.status == 401 else {}
            headers = _raw({"content-type": "application/json"} | more)
            content = json.dumps(refused.told()).encode()
            await answered({"type": "http.response.start", "status": refused.status, "headers": headers})
            await answered({"type": "http.response.body", "body": content, "more_body": True})
            await _linger(receive)
            await answered({"type": "http.response.body", "body": b""})
            return
        read = False

        async def whole() -> Message:
            nonlocal read
            if read:
                return await receive()  # that the other side has gone
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        with contextlib.suppress(TimeoutError, asyncio.CancelledError):  # the end of a slow reader, of the server
            await self.app(scope, whole, answered)

    def _admit(self, scope: Scope) -> None:
        """Refused for a request from elsewhere, to elsewhere, or without the token."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        host = headers.get("host", [])
        if len(host) != 1 or _name(host[0]) not in self.hosts:
            raise Refused(403, "this server goes by another name; --allow-host NAME lets it be called so")
        if any(origin.partition("://")[2].lower() != host[0].lower() for origin in headers.get("origin", [])):
            raise Refused(403, "a page of another site may not ask here")
        if scope["path"] in PAGES and scope["method"] in ("GET", "HEAD"):
            return
        scheme, _, given = " ".join(headers.get("authorization", [])).partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise Refused(401, "the token is missing or wrong; it was printed when the server was started")
        if scope["method"] == "POST" and _media_type(headers) != "application/json":
            raise Refused(415, "send JSON, as content-type: application/json")
        if any(length.isdigit() and int(length) > self.largest for length in headers.get("content-length", [])):
            raise Refused(413, f"more than {self.largest >> 10} KiB")

    async def _body(self, receive: Receive) -> bytes:
        body = b""
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the request has no end")
                    body += bytes(message.get("body", b""))
                    if len(body) > self.largest:
                        raise Refused(413, f"more than {self.largest >> 10} KiB")
                    if not message.get("more_body"):
                        return body
        except TimeoutError as error:
            raise Refused(408, f"the request was not there within {self.seconds:g} seconds") from error


class Impatient(H11Protocol):
    """uvicorn's HTTP, and an end to whoever connects and does not ask. A connection has one request (HEADERS)."""

    closing = False

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the request's head."""
        super().connection_made(transport)
        self.loop.call_later(SECONDS, self._look)

    def _look(self) -> None:
        """Now and then: has it asked yet, and does it take what it was sent before the end?"""
        if self not in self.connections:
            return
        if self.cycle is None or self.closing:
            self.transport.abort()
        else:
            self.closing = self.transport.is_closing()
            self.loop.call_later(SECONDS, self._look)


def called(name: str) -> str:
    """A host's name or address as Host headers write it. ValueError if it is none, or has a port."""
    with contextlib.suppress(ValueError):
        return f"[{ipaddress.IPv6Address(name.strip('[]'))}]"
    if (match := HOST.fullmatch(name)) is None or match[2]:
        raise ValueError(f"{name!r} is no name of a host")
    return name.lower()


async def _linger(receive: Receive) -> None:
    """Hear out for a second who is still sending: a connection that is closed on them loses what was answered."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            while (await receive()).get("more_body"):
                pass


def _name(host: str) -> str:
    """A Host header without its port; nothing if it is none."""
    match = HOST.fullmatch(host)
    return match[1].lower() if match else ""


def _media_type(headers: Mapping[str, Sequence[str]]) -> str:
    return headers.get("content-type", [""])[0].partition(";")[0].strip().lower()


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
