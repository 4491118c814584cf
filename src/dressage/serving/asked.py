"""What may be asked of the server, and how it is read: strictly, since nothing is to be ignored silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dressage.feedback.store import Feedback, State
from dressage.schema import Sampling
from dressage.serving.desk import Answered, drawn_anew
from dressage.serving.guard import Refused

LOWEST = 0.001
"""Temperature above 0."""
CONSENT = {
    "en": "What I write here, the answers and my votes may be kept and used to train this model.",
    "zh": "我在此处写的内容、得到的回答以及我的投票可以被保存，并用于训练此模型。",
}
"""What a person says yes to, in the page's languages; nothing is kept without."""


class Asked(BaseModel):
    """A request's body: what it does not know it refuses."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Body = TypeVar("Body", bound=Asked)


class Turn(Asked):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class Question(Asked):
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


class Vote(Asked):
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
            number=0 if self.ranks is not None else self.index,
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


def read_body(kind: type[Body], content: bytes) -> Body:
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
