"""The parts of which a reward may be the weighted sum: what each is set to (docs/rewards.md)."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from dressage.settings import Above0, HttpUrl, ModelConfig, Natural, NonNegative, Positive, Settings


class AnyPart(Settings):
    """What every part of a reward has."""

    weight: float = 1.0
    """By which its score is multiplied before the parts are added up; 0 only watches."""


class ModelPart(AnyPart):
    """A reward model that `dressage reward` made: its score, of deviation 1 where it was normalised."""

    type: Literal["model"]
    folder: str
    on_failure: float = -5.0
    """What an answer scores whose score is no finite number, before the weight; so in all parts that can fail."""


class EnsemblePart(AnyPart):
    """Several reward models: their mean, less a price of their disagreement (after Coste et al. 2023, sec. 3.2).

    They price the variance; the deviation is in the unit of the scores, so that one coefficient suits all scales.
    """

    type: Literal["ensemble"]
    folders: Annotated[tuple[str, ...], Field(min_length=2)]
    uncertainty_coef: NonNegative = 0.5
    """Price of one standard deviation (population) between the members' scores; 0: the mean alone."""
    on_failure: float = -5.0


class FunctionPart(AnyPart):
    """Your own Python function, called with keywords prompts, answers, targets, finished: lists of one length.

    It returns as many numbers, and runs in a process of its own, which is ended if it hangs.
    """

    type: Literal["function"]
    function: str
    """"package.module:name", or "path/file.py:name"."""
    timeout_seconds: Above0 = 60.0
    """For the answers of one step."""
    on_failure: float = 0.0

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str) -> str:
        where, _, name = function.rpartition(":")
        if not where or not name.isidentifier():
            raise ValueError('write it "package.module:name", or "path/file.py:name"')
        return function


class NumberPart(AnyPart):
    """1 if the answer's last number equals the target's last number, both after "####" where it stands; else 0."""

    type: Literal["number"]


class ExactPart(AnyPart):
    """1 if the answer is the target but for case and white space, both after "####" where it stands; else 0."""

    type: Literal["exact"]


class PatternPart(AnyPart):
    """1 if a regular expression is found in the answer's first 10,000 characters; else 0."""

    type: Literal["pattern"]
    pattern: str
    """As Python's `re` reads it; ^ and $ also match at line breaks."""
    timeout_seconds: Above0 = 10.0
    """For the answers of one step: an expression can take for ever."""
    on_failure: float = 0.0

    @field_validator("pattern")
    @classmethod
    def _is_one(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class LengthPart(AnyPart):
    """1 if the answer has between `low` and `high` words or characters, both included; else 0."""

    type: Literal["length"]
    low: Natural = 0
    high: Natural
    unit: Literal["words", "characters"] = "words"
    """Words stand between white space; for Chinese count characters."""

    @model_validator(mode="after")
    def _range_is_a_range(self) -> LengthPart:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self


class ClassifierPart(AnyPart):
    """A text classifier of transformers: how sure it is of one class."""

    type: Literal["classifier"]
    model: str
    """A folder or hub name of a sequence classification model; safetensors only."""
    label: str | int
    """The class, by its name or its number."""
    reads: Literal["answer", "both"] = "answer"
    """The answer alone, or the prompt's last turn and the answer as a pair."""
    score: Literal["log_odds", "probability"] = "log_odds"
    max_tokens: Positive = 512
    """Longer texts are cut."""
    on_failure: float = -5.0


class RemotePart(AnyPart):
    """A server: POST {"prompts", "answers", "targets", "finished"} -> {"rewards": [...]}."""

    type: Literal["remote"]
    url: HttpUrl
    timeout_seconds: Above0 = 60.0
    """For the answers of one request, with all attempts."""
    batch_size: Positive = 64
    """Answers in one request."""
    on_failure: float = 0.0


class JudgeConfig(Settings):
    """A model that is asked what it thinks of answers."""

    model: ModelConfig = ModelConfig()
    """Loaded here, or as the server of `url` calls it (model.name)."""
    url: HttpUrl | None = None
    """Chat completions of an OpenAI-compatible server (".../v1/chat/completions"); none: the model is loaded here."""
    key_variable: str | None = None
    """Environment variable that holds the server's key."""
    criteria: str = "How helpful, true and clear is the answer?"
    max_new_tokens: Positive = 16
    """Longest verdict."""
    timeout_seconds: Above0 = 60.0
    """For one request to `url`, with all attempts."""

    @model_validator(mode="after")
    def _a_key_is_for_a_server(self) -> Self:
        if self.key_variable is not None and self.url is None:
            raise ValueError("key_variable is for a server: set url, or leave it out")
        return self


class JudgePart(AnyPart, JudgeConfig):
    """A model that is asked for a grade: 0 for the lowest, 1 for the highest, 0.5 where it names none."""

    type: Literal["judge"]
    low: Natural = 1
    high: Positive = 10
    """Grades are whole numbers from low to high."""
    on_failure: float = 0.0

    @model_validator(mode="after")
    def _grades_differ(self) -> JudgePart:
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self


RewardPart = Annotated[
    ModelPart
    | EnsemblePart
    | FunctionPart
    | NumberPart
    | ExactPart
    | PatternPart
    | LengthPart
    | ClassifierPart
    | RemotePart
    | JudgePart,
    Field(discriminator="type"),
]
