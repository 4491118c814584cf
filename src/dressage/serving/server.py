"""A model over HTTP: OpenAI's chat completions, a chat page with votes, and the votes into the feedback store."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dressage.errors import DataError, EngineError, ModelError
from dressage.feedback.store import Feedback, FeedbackStore, State
from dressage.schema import Message, Sampling
from dressage.serving.desk import Answered, Busy, Desk, drawn_anew
from dressage.serving.guard import LARGEST_HEAD, Guard, Impatient, Refused, called

LOWEST = 0.001
"""Temperature above 0."""
AT_ONCE = 64
"""Connections; more are told to come again."""
PAGE = Path(__file__).with_name("page")
CONSENT = {
    "en": "What I write here, the answers and my votes may be kept and used to train this model.",
    "zh": "我在此处写的内容、得到的回答以及我的投票可以被保存，并用于训练此模型。",
}
"""What a person says yes to, in the page's languages; nothing is kept without."""


class _Asked(BaseModel):
    """A request's body: what it does not know it refuses, as nothing is to be ignored silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Body = TypeVar("Body", bound=_Asked)


class Turn(_Asked):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class Question(_Asked):
    """OpenAI's chat completions, as far as they are known here."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=200)]
    model: str = ""
    """Not looked at: there is one."""
    n: Annotated[int, Field(ge=1, le=4)] = 1
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """0, or from LOWEST on: what lies between overflows, and would draw the same."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool = False
    user: str | None = None
    """Not looked at."""

    @field_validator("temperature")
    @classmethod
    def _can_divide(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < LOWEST:
            raise ValueError(f"give 0, which always takes the likeliest token, or at least {LOWEST}")
        return temperature

    def sampling(self, own: Sampling) -> Sampling:
        """The server's way to draw, changed as asked; never more tokens than it allows."""
        asked: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        most = min(own.max_new_tokens, self.max_completion_tokens or self.max_tokens or own.max_new_tokens)
        return replace(drawn_anew(own), max_new_tokens=most, **given)


class Vote(_Asked):
    """What a person says of answers that this server gave: one of ranks, good and better."""

    id: str
    """Of the chat completion."""
    annotator: Annotated[str, Field(max_length=64)] = ""
    consent: Literal["en", "zh"]
    """In which language the person agreed; without, nothing is kept."""
    ranks: list[Annotated[int, Field(ge=0, lt=100)]] | None = None
    """Of all answers, 0 the best; equal ranks are a tie."""
    good: bool | None = None
    """Of answer number `index`."""
    better: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None
    """What answer number `index` should have been."""
    index: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _says_one_thing(self) -> Vote:
        if sum(said is not None for said in (self.ranks, self.good, self.better)) != 1:
            raise ValueError("give one of ranks, good and better")
        if self.better is not None and not self.better.strip():
            raise ValueError("better has no words")
        if not self.annotator.isprintable():
            raise ValueError("annotator is a name of printable characters")
        return self

    def feedback(self, of: Answered, model: Mapping[str, Any], state: State) -> Feedback:
        """The record. Refused where it does not fit what was answered."""
        finished = tuple(finish == "stop" for finish in of.finishes)
        if self.ranks is not None and len(self.ranks) != len(of.answers):
            raise Refused(400, f"{len(self.ranks)} ranks for {len(of.answers)} answers")
        if self.ranks is not None and len(self.ranks) < 2:
            raise Refused(400, "one answer cannot be ranked; say whether it is good, or what were better")
        if self.index >= len(of.answers):
            raise Refused(400, f"there is no answer number {self.index}")
        drawn = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
        record = Feedback(
            kind="ranking",
            annotator=self.annotator.strip() or "anonymous",
            prompt=of.prompt.messages,
            answers=of.answers,
            finished=finished,
            verdict=tuple(self.ranks or ()),
            model=model,
            sampling={name: getattr(of.sampling, name) for name in drawn},
            reply=of.id,
            number=self.index,
            consent=CONSENT[self.consent],
            state=state,
        )
        if self.ranks is not None:
            return record
        if self.better is not None:
            return replace(record, kind="demonstration", answers=(self.better,), finished=(True,))
        one = slice(self.index, self.index + 1)
        verdict = (1 if self.good else 0,)
        return replace(record, kind="rating", answers=of.answers[one], finished=finished[one], verdict=verdict)


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
        question = _read(Question, await request.body())
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
        vote = _read(Vote, await request.body())
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


def _read(kind: type[Body], content: bytes) -> Body:
    """A request's body. Refused in a line that says which field is wrong."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        faults = []
        for one in error.errors(include_url=False, include_input=False)[:3]:
            where = ".".join(map(str, one["loc"]))[:60]
            said = "is not known here; leave it out" if one["type"] == "extra_forbidden" else one["msg"]
            faults.append(f"{where}: {said}" if where else said)
        raise Refused(400, "; ".join(faults)) from error


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
