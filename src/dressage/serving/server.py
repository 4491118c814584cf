"""A model over HTTP: OpenAI's chat completions, a chat page with votes, and the votes into the feedback store."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dressage.errors import DataError, EngineError, ModelError
from dressage.feedback.store import FeedbackStore, State
from dressage.schema import Message
from dressage.serving.asked import CONSENT, Question, Vote, read_body
from dressage.serving.desk import Answered, Busy, Desk
from dressage.serving.guard import LARGEST_HEAD, Guard, Impatient, Refused, called

AT_ONCE = 64
"""Connections; more are told to come again."""
PAGE = Path(__file__).with_name("page")


@dataclass(frozen=True)
class Service:
    """What the routes do. None of them changes a weight, reads a path from a request, or tells what others said."""

    desk: Desk
    store: FeedbackStore | None
    arriving: State = "kept"
    """What new feedback is."""

    def routes(self) -> list[Route]:
        """All there are."""
        pages = {"/": "index.html", "/chat.js": "chat.js", "/style.css": "style.css"}
        return [
            *(Route(path, _file(name), methods=["GET"]) for path, name in pages.items()),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/feedback", self.vote, methods=["POST"]),
            Route("/v1/feedback/{id}", self.withdraw, methods=["DELETE"]),
        ]

    async def models(self, request: Request) -> Response:
        """The one model, and what its page has to know."""
        own = self.desk.sampling
        told = {"id": self.desk.model["name"], "object": "model", "created": 0, "owned_by": "dressage"}
        told |= {"feedback": self.store is not None, "consent": CONSENT}
        told |= {"temperature": own.temperature, "max_tokens": own.max_new_tokens}
        return JSONResponse({"object": "list", "data": [told]})

    async def complete(self, request: Request) -> ASGIApp:
        """One or several answers, whole or as they are written."""
        question = read_body(Question, await request.body())
        sampling = question.sampling(self.desk.sampling)
        messages = [Message(turn.role, turn.content) for turn in question.messages]
        prompt = await asyncio.to_thread(self.desk.encode, messages)
        identity = f"chatcmpl-{secrets.token_hex(12)}"
        told = {"id": identity, "created": int(time.time()), "model": self.desk.model["name"]}
        gone = asyncio.ensure_future(request.receive())
        written = self.desk.write(prompt, sampling, question.n, identity, gone)
        try:
            first = await anext(written, None)  # before a good beginning is made of what fails
        except BaseException:
            gone.cancel()
            raise
        return (_streamed if question.stream else _whole)(_Writing(written, first, gone, told, len(prompt.tokens)))

    async def vote(self, request: Request) -> Response:
        """Keep what a person says of an answer."""
        vote = read_body(Vote, await request.body())
        if self.store is None:
            raise Refused(404, "this server takes no feedback; start it with --feedback")
        answered = self.desk.known(vote.id)
        if answered is None:
            raise Refused(404, "no such answer, or too long ago: feedback is taken of what this server answered")
        feedback = vote.feedback(answered, self.desk.model, self.arriving)
        if not await _stored(self.store.add, feedback):
            raise Refused(409, "there is a vote on this under this name already; take it back first")
        return JSONResponse({"id": feedback.id, "state": feedback.state}, 201)

    async def withdraw(self, request: Request) -> Response:
        """Delete what a person said, by the name that only they were told."""
        if self.store is None or not await _stored(self.store.delete, ids=[request.path_params["id"]]):
            raise Refused(404, "no such feedback")
        return Response(status_code=204)


async def _stored(change: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What the store says to a change. Refused, and told to who runs the server, where it cannot be made."""
    try:
        return await run_in_threadpool(change, *given, **named)
    except DataError as error:
        print(f"error: feedback: {error}", file=sys.stderr, flush=True)
        raise Refused(503, "feedback cannot be changed just now; try again in a moment") from error


def build_app(service: Service) -> Starlette:
    """The routes, and what goes wrong in them as a line."""

    def told(status: int) -> Any:
        async def answer(_: Request, error: Exception) -> Response:
            return _refusal(Refused(status, str(error)))

        return answer

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _refusal(error)

    async def routed(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _refusal(Refused(error.status_code, error.detail))

    handlers: dict[Any, Any] = {Refused: refused, HTTPException: routed, Busy: told(503)}
    handlers |= {DataError: told(400), ModelError: told(400), EngineError: told(400)}
    return Starlette(routes=service.routes(), exception_handlers=handlers)


def guarded(service: Service, *, token: str, hosts: Sequence[str]) -> uvicorn.Server:
    """The server, ready to run. `hosts` are the names by which it may be called."""
    return uvicorn.Server(
        uvicorn.Config(
            Guard(build_app(service), token, frozenset(map(called, hosts))),
            http=Impatient,
            h11_max_incomplete_event_size=LARGEST_HEAD,
            ws="none",
            lifespan="off",
            loop="asyncio",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="error",
            limit_concurrency=AT_ONCE,
            timeout_graceful_shutdown=2,
        )
    )


def _refusal(error: Refused) -> Response:
    return JSONResponse(error.told(), error.status)


def _file(name: str) -> Any:
    async def page(_: Request) -> Response:
        return FileResponse(PAGE / name)

    return page


def _choices(answered: Answered) -> list[dict[str, Any]]:
    return [
        {"index": number, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        for number, (text, finish) in enumerate(zip(answered.answers, answered.finishes, strict=True))
    ]


@dataclass(frozen=True)
class _Writing:
    """An answer that has begun."""

    rest: AsyncGenerator[tuple[int, str] | Answered, None]
    first: tuple[int, str] | Answered | None
    """None: who asked went away before their turn came."""
    gone: asyncio.Future[Any]
    told: Mapping[str, Any]
    """What every part of the reply says."""
    asked: int
    """Tokens of the prompt."""

    async def pieces(self) -> AsyncGenerator[tuple[int, str] | Answered, None]:
        """All of it."""
        try:
            async with aclosing(self.rest):
                if self.first is not None:
                    yield self.first
                async for one in self.rest:
                    yield one
        finally:
            self.gone.cancel()


def _whole(writing: _Writing) -> ASGIApp:
    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(writing.pieces()) as written:
            async for one in written:
                if isinstance(one, Answered):
                    counts = {"prompt_tokens": writing.asked, "completion_tokens": one.tokens}
                    usage = counts | {"total_tokens": sum(counts.values())}
                    told = {**writing.told, "object": "chat.completion", "choices": _choices(one), "usage": usage}
                    await JSONResponse(told)(scope, receive, send)

    return respond


def _streamed(writing: _Writing) -> ASGIApp:
    """Server-sent events, as OpenAI's clients read them."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        async def event(content: Mapping[str, Any]) -> None:
            line = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
            await send({"type": "http.response.body", "body": line, "more_body": True})

        async def chunk(number: int, delta: dict[str, str], finish: str | None) -> None:
            choice = {"index": number, "delta": delta, "finish_reason": finish}
            await event({**writing.told, "object": "chat.completion.chunk", "choices": [choice]})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        begun: set[int] = set()
        try:
            async with aclosing(writing.pieces()) as written:
                async for one in written:
                    if isinstance(one, Answered):
                        for number, finish in enumerate(one.finishes):
                            await chunk(number, {}, finish)
                    else:
                        number, piece = one
                        await chunk(
                            number, ({} if number in begun else {"role": "assistant"}) | {"content": piece}, None
                        )
                        begun.add(number)
        except EngineError as error:
            await event(Refused(500, str(error)).told())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return respond
