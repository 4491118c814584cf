"""The terminal chat with a small real model and a template of bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from dressage.errors import EngineError
from dressage.rollout.native import NativeEngine
from dressage.schema import Message, Prompt, Sampling
from dressage.serving.chat import chat, pieces

END = 256


@dataclass(frozen=True)
class ByteTemplate:
    """A token is a byte of UTF-8; remembers what it was asked to encode, which is how tests look inside."""

    source: str = "{{ enable_thinking }}"
    thinking: bool | None = None
    asked: list[tuple[bool | None, tuple[Message, ...]]] = field(default_factory=list)

    def encode_prompt(self, prompt: Prompt) -> Prompt:
        self.asked.append((self.thinking, prompt.messages))
        text = "".join(f"{message.role[0]}:{message.content}\n" for message in prompt.messages)
        return replace(prompt, tokens=tuple(text.encode()))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token != END).decode(errors="replace")


@dataclass
class Scripted:
    """Says what it was given, an answer a turn; Ctrl-C is pressed where the script has an exception."""

    answers: list[list[Any]]
    heard: list[Sampling] = field(default_factory=list)

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
        self.heard.append(sampling)
        for token in self.answers.pop(0):
            if not isinstance(token, int):
                raise token
            yield token


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(text: str) -> list[Any]:
    return [*text.encode(), END]


def talk(engine: Any, *lines: str, template: ByteTemplate | None = None, terminal: bool = False, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    stream = (Terminal if terminal else io.StringIO)("".join(f"{line}\n" for line in lines))
    asked: Any = template or ByteTemplate()
    chat(engine, asked, sampling=Sampling(max_new_tokens=20), console=console, input_stream=stream, **options)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_real_model_answers_from_a_pipe() -> None:
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    engine = NativeEngine(transformers.LlamaForCausalLM(config), stop_tokens=[END], pad_token=END)
    template = ByteTemplate()
    talk(engine, "/temperature 0", "hello", "again", template=template)
    first = replace(Prompt.of("hello"), tokens=tuple(b"u:hello\n"))
    answer = engine.generate([first], Sampling(max_new_tokens=20, temperature=0.0))[0]
    assert template.asked[1][1][1] == Message("assistant", template.decode(answer.tokens))


def test_answers_alone_are_printed_to_a_pipe_and_history_is_kept() -> None:
    template = ByteTemplate()
    assert talk(Scripted([said("one"), said("two")]), "first?", "", "second?", template=template) == "one\ntwo\n"
    assert template.asked[-1][1] == (
        Message("user", "first?"),
        Message("assistant", "one"),
        Message("user", "second?"),
    )


def test_each_turn_has_its_own_seed() -> None:
    engine = Scripted([said("a")] * 3)
    talk(engine, "x", "x", "x")
    assert [sampling.seed for sampling in engine.heard] == [0, 1, 2]


def test_characters_come_whole() -> None:
    """Chinese characters are three bytes, an emoji four: nothing is shown before the last one."""
    template: Any = ByteTemplate()
    text = "猫 and 🐈。"
    assert list(pieces(template, iter(said(text)))) == list(text)
    assert list(pieces(template, iter([*"好".encode()[:2]]))) == ["\ufffd"], "an answer cut inside a character shows it"
    assert list(pieces(template, iter([0xFF, *b"ab"]))) == ["\ufffda", "b"], "bytes that never become one do not block"
    assert talk(Scripted([said(text)]), "hi") == text + "\n"


def test_an_answer_does_not_steer_the_terminal() -> None:
    assert talk(Scripted([said("\x1b[31m[bold]red[/]\x07 ok")]), "hi") == "[31m[bold]red[/] ok\n"


def test_commands() -> None:
    template = ByteTemplate()
    engine = Scripted([said("a"), said("b"), said("c")])
    output = talk(
        engine,
        "/help",
        "/system Be brief.",
        "/think on",
        "/temperature 0.3",
        "one",
        "/reset",
        "/think off",
        "/system",
        "two",
        "/exit",
        "never",
        template=template,
    )
    for name in ("/help", "/reset", "/system", "/think", "/temperature", "/exit"):
        assert f"\n{name} " in "\n" + output
    assert template.asked == [
        (True, (Message("system", "Be brief."), Message("user", "one"))),
        (False, (Message("user", "two"),)),
    ]
    assert engine.heard[0].temperature == 0.3
    assert engine.answers == [said("c")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/nonsense", "/nonsense: no such command; /help lists them"),
        ("/think perhaps", "/think takes on or off"),
        ("/temperature hot", "/temperature takes a number"),
        ("/temperature -1", "/temperature takes a number"),
        ("/temperature nan", "/temperature takes a number"),
        ("/think on", "no thinking mode"),
    ],
)
def test_slips_are_explained_and_the_talk_goes_on(line: str, complaint: str) -> None:
    output = talk(Scripted([said("still here")]), line, "hi", template=ByteTemplate(source="plain"))
    assert complaint in output and output.endswith("still here\n")


def test_what_the_engine_refuses_is_taken_back() -> None:
    template = ByteTemplate()
    output = talk(Scripted([[EngineError("too long")], said("fine")]), "long", "short", template=template)
    assert output == "too long\nfine\n"
    assert template.asked[-1][1] == (Message("user", "short"),)


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    template = ByteTemplate()
    engine = Scripted([[*b"half", KeyboardInterrupt()], [KeyboardInterrupt()], said("whole")])
    assert talk(engine, "a", "b", "c", template=template) == "half [stopped]\n [stopped]\nwhole\n"
    assert [message.content for message in template.asked[-1][1]] == ["a", "half", "c"]


def test_a_person_is_greeted_and_thinking_can_be_set_from_the_start() -> None:
    template = ByteTemplate()
    output = talk(Scripted([said("hello")]), "hi", "/exit", template=template, terminal=True, thinking=False)
    assert output.startswith("Write, and the model answers.") and "hello\n" in output
    assert template.asked[0][0] is False
