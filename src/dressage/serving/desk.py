"""Where questions wait for one model, and where what it answered is known for a while."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dressage.data.template import ChatTemplate
from dressage.schema import Finish, Message, Prompt, Sampling
from dressage.serving.chat import Spoken

REMEMBERED = 500
"""Answers of which feedback is taken, the newest."""
WAITING = 8
"""Questions that may wait for their turn."""


class Several(Protocol):
    """An engine that can be listened to while it writes several answers."""

    def stream_several(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, int]]:
        """Which answer, and its next token."""
        ...


class Busy(Exception):
    """Too many are waiting."""


@dataclass(frozen=True)
class Answered:
    """What was asked and answered, as this server knows it: nobody's word is taken for it."""

    id: str
    prompt: Prompt
    answers: tuple[str, ...]
    finishes: tuple[Finish, ...]
    tokens: int
    """Of all answers."""
    sampling: Sampling


@dataclass
class Desk:
    """One model, asked by many: one question is answered at a time."""

    engine: Several
    template: ChatTemplate
    sampling: Sampling
    """How it answers unless a question says otherwise; its `max_new_tokens` is the most."""
    model: Mapping[str, Any]
    """Its name and its weights' hash."""
    system: str | None = None
    """For conversations that bring no system turn."""
    seconds: float = 120.0
    """The most that one question's answers may take; then they are cut."""
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _waiting: int = 0
    _known: OrderedDict[str, Answered] = field(default_factory=OrderedDict)

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """A conversation with its tokens. DataError or ModelError if it is none that this model can go on with."""
        head = [] if self.system is None or (messages[:1] and messages[0].role == "system") else [self.system]
        return self.template.encode_prompt(Prompt((*(Message("system", words) for words in head), *messages)))

    async def write(
        self, prompt: Prompt, sampling: Sampling, count: int, identity: str, gone: Awaitable[Any]
    ) -> AsyncGenerator[tuple[int, str] | Answered, None]:
        """Pieces of `count` answers with their numbers, then all of it together, remembered as `identity`.

        It ends where it is, even in the queue, when `gone` is done: nobody listens any more. Raises: Busy if too many
        wait already. EngineError before the first piece if the prompt is too long.
        """
        if self._waiting >= WAITING:
            raise Busy(f"{self._waiting} are waiting already; ask again in a moment")
        left = asyncio.ensure_future(gone)
        turn = asyncio.ensure_future(self._turn.acquire())
        self._waiting += 1
        try:
            await asyncio.wait((turn, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting -= 1
            if not turn.done():
                turn.cancel()
        if turn.cancelled() or not turn.done():
            return
        try:
            ends = time.monotonic() + self.seconds
            spoken = [Spoken(self.template) for _ in range(count)]
            drawn = self.engine.stream_several([prompt] * count, sampling)
            # In another thread: who asks something else meanwhile hears that it has to wait.
            while time.monotonic() < ends and (step := await asyncio.to_thread(next, drawn, None)) is not None:
                if left.done():
                    return
                number, token = step
                if piece := spoken[number].hear(token):
                    yield number, piece
            for number, one in enumerate(spoken):
                if piece := one.rest():
                    yield number, piece
        finally:
            self._turn.release()
        yield self._remember(identity, prompt, sampling, spoken)

    def known(self, identity: str) -> Answered | None:
        """What was answered under this name, if it was not too long ago."""
        return self._known.get(identity)

    def _remember(self, identity: str, prompt: Prompt, sampling: Sampling, spoken: Sequence[Spoken]) -> Answered:
        stops = self.template.stop_tokens
        answered = Answered(
            id=identity,
            prompt=replace(prompt, tokens=()),
            answers=tuple(self.template.decode(one.tokens) for one in spoken),
            finishes=tuple("stop" if one.tokens and one.tokens[-1] in stops else "length" for one in spoken),
            tokens=sum(len(one.tokens) for one in spoken),
            sampling=sampling,
        )
        self._known[answered.id] = answered
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return answered


def drawn_anew(sampling: Sampling) -> Sampling:
    """The same with a seed of its own: asking again is worth while."""
    return replace(sampling, seed=secrets.randbelow(2**31))
