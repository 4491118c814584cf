"""The plain nouns: what people write and choose, and what a policy answers. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length"]
"""Why an answer ended: the policy said so, or it met the limit."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: a conversation whose next turn is the assistant's."""

    messages: tuple[Message, ...]
    tokens: tuple[int, ...] = field(default=(), compare=False)
    """The same as the policy's tokenizer and template write it, generation prompt included; empty until encoded."""
    target: str | None = field(default=None, compare=False)
    """What the right answer is, where the data say so: for rewards that verify, never shown to the policy."""

    @property
    def id(self) -> str:
        """The same for the same conversation on every machine: 16 hexadecimal digits."""
        text = json.dumps([[m.role, m.content] for m in self.messages], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """The last turn's words: what a person would call the question."""
        return self.messages[-1].content if self.messages else ""

    @classmethod
    def of(cls, text: str, system: str | None = None) -> Prompt:
        """A single user turn, after a system turn if one is given."""
        head = () if system is None else (Message("system", system),)
        return cls((*head, Message("user", text)))


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate; the last turn is the assistant's."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Ranking:
    """K answers to one prompt, K >= 2, and a rank for each: 0 is best, equal ranks are a tie."""

    prompt: Prompt
    answers: tuple[str, ...]
    ranks: tuple[int, ...]
    finished: tuple[bool, ...] = ()
    """False where an answer was cut: such a text gets no end mark. Empty: all are finished."""
    grades: tuple[float, ...] = ()
    """How good each answer was found, on any scale, higher is better; two of them differ by how strongly the better
    one won. Empty: only the order is known."""

    @classmethod
    def of_pair(cls, prompt: Prompt, chosen: str, rejected: str) -> Ranking:
        """A comparison is a ranking of two."""
        return cls(prompt, (chosen, rejected), (0, 1))


@dataclass(frozen=True)
class Rating:
    """An answer judged by itself: thumbs up or down."""

    prompt: Prompt
    answer: str
    good: bool
    finished: bool = True
    """False where the answer was cut: such a text gets no end mark."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Sample k of a prompt depends on (seed, prompt, k) alone, not on its batch."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    seed: int = 0
    length_range: tuple[int, int] | None = None
    """Least and greatest limit of an answer's tokens, drawn for each anew; none: all have `max_new_tokens`."""


@dataclass(frozen=True)
class Completion:
    """What an engine answered to one prompt."""

    tokens: tuple[int, ...]
    """The end mark included when `finish` is "stop"."""
    logprobs: tuple[float, ...]
    """Of each token, natural log, at the sampling temperature, as the engine saw it."""
    finish: Finish
    version: int = 0
    """Which weights answered."""


@dataclass(frozen=True)
class Rollout:
    """A prompt with one sampled answer; answers to one prompt share a group."""

    prompt: Prompt
    completion: Completion
    text: str
    """The answer's words, without the end mark."""
    group: int
    """Equal for the answers of one step to one prompt."""


@dataclass(frozen=True)
class Reward:
    """What an answer earned, and of what it is made."""

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """By name, before their weights."""
    failed: tuple[str, ...] = ()
    """Parts that raised, hung or gave no finite number, and stand here with their score on failure."""
