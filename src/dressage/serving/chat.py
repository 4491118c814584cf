"""Talking to a model in the terminal."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TextIO

from rich.console import Console

from dressage.data.template import ChatTemplate
from dressage.errors import ConfigError, DressageError, ModelError
from dressage.rewards.learned import Scorer
from dressage.rollout.engine import Engine
from dressage.schema import Message, Prompt, Rollout, Sampling


class Streaming(Protocol):
    """An engine that can be listened to."""

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
        """The tokens of one answer as they are drawn."""
        ...


@dataclass(frozen=True)
class BestOf:
    """An engine that is heard only once it has written several answers: the one that scores highest."""

    engine: Engine
    scorer: Scorer
    template: ChatTemplate
    count: int
    console: Console

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
        """The tokens of the best answer. The first of those it is chosen from is the one that would else be heard."""
        completions = self.engine.generate([prompt] * self.count, sampling)
        rollouts = [Rollout(prompt, each, self.template.decode(each.tokens), 0) for each in completions]
        scores = [reward.total for reward in self.scorer.score(rollouts)]
        best = max(range(self.count), key=scores.__getitem__)
        said = f"score {scores[best]:+.2f}, the best of {self.count} (mean {sum(scores) / self.count:+.2f})"
        self.console.print(said, style="dim", highlight=False)
        yield from completions[best].tokens


@dataclass
class Conversation:
    """What has been said, and how to go on."""

    template: ChatTemplate
    sampling: Sampling
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    over: bool = False

    def prompt(self) -> Prompt:
        """The turns so far, encoded; the last is the user's."""
        head = [] if self.system is None else [Message("system", self.system)]
        return self.template.encode_prompt(Prompt((*head, *self.turns)))


def chat(
    engine: Streaming,
    template: ChatTemplate,
    *,
    sampling: Sampling,
    system: str | None = None,
    thinking: bool | None = None,
    console: Console | None = None,
    input_stream: TextIO | None = None,
) -> None:
    """Answers lines until they end or /exit; Ctrl-C stops an answer, not the program.

    A person at a terminal gets a prompt mark; from a pipe each line is a turn, and answers alone are printed.
    """
    console = console or Console()
    lines = input_stream or sys.stdin
    talk = Conversation(template if thinking is None else with_thinking(template, thinking), sampling, system)
    if lines.isatty():
        console.print("Write, and the model answers. /help lists the commands, Ctrl-C stops an answer.", style="dim")
    while not talk.over and (line := _read(lines, console)) is not None:
        if not line:
            continue
        try:
            if line.startswith("/"):
                console.print(obey(talk, line), style="dim", markup=False, highlight=False)
            else:
                answer(talk, engine, line, console)
        except DressageError as error:
            console.print(str(error), style="red", markup=False, highlight=False)


def answer(talk: Conversation, engine: Streaming, question: str, console: Console) -> None:
    """One question and its answer, written as it comes; an answer that was stopped stays as far as it came."""
    talk.turns.append(Message("user", question))
    said = ""
    try:
        # Another seed each turn, so that asking again is worth while.
        sampling = replace(talk.sampling, seed=talk.sampling.seed + len(talk.turns) // 2)
        for piece in pieces(talk.template, engine.stream(talk.prompt(), sampling)):
            said += piece
            console.out(_printable(piece), end="", highlight=False)
            console.file.flush()
    except KeyboardInterrupt:
        console.out(" [stopped]", end="", highlight=False)
    finally:
        # A question without an answer would leave two turns of the user in a row.
        if said:
            talk.turns.append(Message("assistant", said))
        else:
            talk.turns.pop()
    console.out("")


class Spoken:
    """The text of an answer that comes token by token; a character is held back until its last byte is there."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.tokens: list[int] = []
        self.shown = ""

    def hear(self, token: int) -> str:
        """What can be shown now that has not been."""
        self.tokens.append(token)
        # Decoders write U+FFFD for bytes that are not a character yet; a real one follows with the next token.
        text = self.template.decode(self.tokens).rstrip("\ufffd")
        return self._up_to(text) if text.startswith(self.shown) else ""

    def rest(self) -> str:
        """What was held back and will not become a character any more."""
        return self._up_to(self.template.decode(self.tokens)) if self.tokens else ""

    def _up_to(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], max(self.shown, text, key=len)
        return new


def pieces(template: ChatTemplate, tokens: Iterator[int]) -> Iterator[str]:
    """The text of a stream of tokens, bit by bit."""
    spoken = Spoken(template)
    for token in tokens:
        if piece := spoken.hear(token):
            yield piece
    if piece := spoken.rest():
        yield piece


def with_thinking(template: ChatTemplate, thinking: bool) -> ChatTemplate:
    """The template with its thinking mode on or off. ModelError if it has none."""
    if "enable_thinking" not in template.source:
        raise ModelError("this model's chat template has no thinking mode to switch")
    return replace(template, thinking=thinking)


def obey(talk: Conversation, line: str) -> str:
    """Carry out a command; returns what to say about it. ConfigError if there is no such command."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise ConfigError(f"{name}: no such command; /help lists them")
    return COMMANDS[name][1](talk, argument.strip())


def _help(talk: Conversation, argument: str) -> str:
    return "\n".join(f"{name:<13} {text}" for name, (text, _) in COMMANDS.items())


def _reset(talk: Conversation, argument: str) -> str:
    talk.turns.clear()
    return "The conversation begins anew."


def _system(talk: Conversation, argument: str) -> str:
    talk.system = argument or None
    return f"System message: {argument}" if argument else "System message: the template's own."


def _think(talk: Conversation, argument: str) -> str:
    if argument not in ("on", "off"):
        raise ConfigError("/think takes on or off")
    talk.template = with_thinking(talk.template, argument == "on")
    return f"Thinking is {argument}."


def _temperature(talk: Conversation, argument: str) -> str:
    try:
        temperature = float(argument)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature < float("inf"):
        raise ConfigError("/temperature takes a number, 0 or more; 0 always takes the likeliest word")
    talk.sampling = replace(talk.sampling, temperature=temperature)
    return f"Temperature is {temperature:g}."


def _exit(talk: Conversation, argument: str) -> str:
    talk.over = True
    return "Goodbye."


COMMANDS: Mapping[str, tuple[str, Callable[[Conversation, str], str]]] = {
    "/help": ("this list", _help),
    "/reset": ("forget what was said", _reset),
    "/system": ("TEXT: how the model should behave; without TEXT the template's own", _system),
    "/think": ("on or off, where the model has a thinking mode", _think),
    "/temperature": ("X: 0 always takes the likeliest word, 1 is as trained", _temperature),
    "/exit": ("leave (Ctrl-D too)", _exit),
}


def _read(lines: TextIO, console: Console) -> str | None:
    """The next line without its end; None where there are no more."""
    if not lines.isatty():
        line = lines.readline()
        return line.strip() if line else None
    try:
        # Through input(), which brings line editing and history, where it is the terminal we read.
        return (console.input("[bold]> [/]") if lines is sys.stdin else lines.readline()).strip()
    except KeyboardInterrupt:
        console.print("(/exit leaves)", style="dim", highlight=False)
        return ""
    except EOFError:
        return None


def _printable(text: str) -> str:
    """Without control characters: a model does not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
