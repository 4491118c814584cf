"""What rows of people's files are made of: texts, turns, conversations and grades, in whatever way they are written.

White space around a turn is how a file was laid out, not what was said, and is stripped; only Dressage's own files
keep their texts to the letter, because sampled answers are compared with what the policy wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dressage.schema import Message, Prompt, Role


class BadRow(Exception):
    """A row that is not a record; `reason` is the same for all rows with this fault, the message may say more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


ROLES: Mapping[object, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
        case str():
            return "text"
    return f"a {type(value).__name__}"


def exact_text(value: object, what: str) -> str:
    """Text to the letter. `what`, here and below: what the value is called in a BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{what} is {_kind(value)}, not text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRow(f"{what} is not valid Unicode")
    return value


def stripped_text(value: object, what: str) -> str:
    """Text without the white space around it."""
    return exact_text(value, what).strip()


def filled_text(value: object, what: str) -> str:
    """Text that is not empty."""
    text = stripped_text(value, what)
    if not text:
        raise BadRow(f"empty {what}")
    return text


def list_of(value: object, what: str) -> Sequence[Any]:
    """A list, or BadRow."""
    if not isinstance(value, list | tuple):
        raise BadRow(f"{what} is {_kind(value)}, not a list")
    return value


def object_of(value: object, what: str) -> Mapping[str, Any]:
    """An object of names and values, or BadRow."""
    if not isinstance(value, Mapping):
        raise BadRow(f"{what} is {_kind(value)}, not an object")
    return value


LARGEST_GRADE = 1e15
"""Beyond, a grade's square leaves float32, and nothing can be learnt from it."""


def grade_of(value: object, what: str) -> float:
    """A finite number, or BadRow."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{what} is {_kind(value)}, not a finite number")
    if not abs(value) <= LARGEST_GRADE:  # NaN is not either
        raise BadRow(f"{what} is no finite number, or too large", f"{value:.3g}" if isinstance(value, float) else "")
    return float(value)


def dense_ranks(places: Sequence[float]) -> tuple[int, ...]:
    """0 for the lowest, then 1, 2, ...; equal places are a tie."""
    order = {place: rank for rank, place in enumerate(sorted(set(places)))}
    return tuple(order[place] for place in places)


def turn_of(value: object) -> tuple[Role, str]:
    """A turn written {"role", "content"} or {"from", "value"}."""
    turn = object_of(value, "a turn")
    name, words = (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow("a turn of unknown role", repr(name)[:40])
    return role, stripped_text(words, "a turn")


def joined(turns: Iterable[tuple[Role, str]]) -> tuple[Message, ...]:
    """Neighbouring turns of one speaker are one turn: chat templates want speakers to alternate."""
    messages: list[Message] = []
    for role, words in turns:
        if messages and messages[-1].role == role:
            messages[-1] = Message(role, f"{messages[-1].content}\n\n{words}".strip())
        else:
            messages.append(Message(role, words))
    return tuple(messages)


def conversation_of(turns: Iterable[tuple[Role, str]]) -> tuple[Message, ...]:
    """Checked: perhaps a system turn, then user and assistant in turn, the user first, nobody silent."""
    messages = joined(turns)
    if messages and messages[0] == Message("system", ""):
        messages = messages[1:]
    spoken = messages[1:] if messages and messages[0].role == "system" else messages
    if not spoken or spoken[0].role != "user":
        raise BadRow("the conversation does not begin with a user's turn")
    for message in spoken:
        if message.role == "system":
            raise BadRow("a system turn inside the conversation")
        if not message.content:
            raise BadRow("empty answer" if message.role == "assistant" else "empty prompt")
    return messages


def _dialogue(text: str) -> list[tuple[Role, str]]:
    r"""Turns of "\n\nHuman: ...\n\nAssistant: ..."; an empty last turn is where the answer goes."""
    before, *rest = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not rest:
        raise BadRow("not a dialogue of Human: and Assistant: turns")
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [("user" if name == "Human" else "assistant", words.strip()) for name, words in turns]


def turns_of(value: object, what: str) -> list[tuple[Role, str]]:
    """Turns of a conversation, written as a list of turns or as a dialogue in one text."""
    if isinstance(value, str):
        return _dialogue(exact_text(value, what))
    return [turn_of(item) for item in list_of(value, what)]


def question_of(value: object) -> Prompt:
    """A prompt in whatever way people write one: a text, a dialogue in a text, a list of turns."""
    if isinstance(value, str) and not re.match(r"\s*Human:", value):
        return Prompt.of(filled_text(value, "prompt"))
    turns = turns_of(value.lstrip() if isinstance(value, str) else value, "prompt")
    while turns and turns[-1] == ("assistant", ""):
        turns.pop()
    return to_answer(conversation_of(turns))


def answer_of(value: object) -> str:
    """An answer in whatever way people write one: a text, a turn, a list of turns that ends in it."""
    if isinstance(value, list | tuple) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        role, words = turn_of(value)
        if role != "assistant":
            raise BadRow("the answer is not the assistant's")
        value = words
    return filled_text(value, "answer")


def to_answer(messages: tuple[Message, ...]) -> Prompt:
    """What an answer is asked to: a conversation without the one it may end in."""
    return Prompt(messages[:-1] if messages[-1].role == "assistant" else messages)
