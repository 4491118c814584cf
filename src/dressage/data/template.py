"""Conversations -> tokens, and which of them the assistant wrote.

What is sampled, trained and scored is always `encode_prompt(prompt).tokens` followed by the answer's own tokens and the
end mark. Where answers stand is known because each is found by rendering the conversation once more with a mark in its
place, never by looking at token ids: in many models padding, end mark and end of text are one token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dressage.errors import DataError, ModelError
from dressage.schema import Demonstration, Message, Prompt

PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}Human:\n{{ message.content }}\n\n"
    "{% else %}Assistant:\n{{ message.content }}{{ eos_token }}\n\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""For models without a template. An answer begins a line, because "Assistant: " would end in a space that tokenizers
write as part of the next word."""

READER = "{% for message in messages %}{{ message.content }}{{ eos_token or sep_token }}{% endfor %}"
"""For encoders without a template: turns apart by the mark that they have seen between two texts."""

_ANSWER = "\ue000"
_OPEN, _CLOSE = "\ue001", "\ue002"
_PROBES = ("\ue003", "\ue004", "\ue005")
_SHIELD = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; the mask is True on answers and their end marks."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with its choices made; make one with `ChatTemplate.of`."""

    tokenizer: Any
    source: str
    system: str | None
    thinking: bool | None
    end_mark: str
    """Ends an answer, as the template writes it."""
    end_token: int
    stop_tokens: frozenset[int]
    pad_token: int
    user_header: str
    """What the template writes before a user's words."""
    lead: str
    """White space that the template writes before an answer but leaves out when it asks for one: Mistral's space. It
    is the model's to write, so it is trained and sampled with the answer, and is no part of the answer's words."""
    literal: tuple[str, ...]
    """Texts that the tokenizer would take for special tokens where somebody merely wrote them."""

    @classmethod
    def of(
        cls, tokenizer: Any, *, system: str | None = None, thinking: bool | None = None, template: str | None = None
    ) -> ChatTemplate:
        """The tokenizer's template, or `template` (Jinja source), or PLAIN where there is neither.

        A conversation's own system turn stays. One without gets `system`: None leaves it to the template, which may
        insert its own; "" sees to it that there is none. `thinking` is the template's switch `enable_thinking`; None
        leaves that to the template too.

        Raises: ModelError if the template cannot be rendered, knows no such switch, or no token ends an answer.
        """
        source = template if template is not None or not tokenizer.chat_template else tokenizer.get_chat_template()
        source = PLAIN if source is None else source
        if thinking is not None and "enable_thinking" not in source:
            raise ModelError("the chat template has no thinking switch (enable_thinking); leave thinking unset")
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        rough = cls(
            tokenizer=tokenizer,
            source=source,
            system=None,
            thinking=thinking,
            end_mark="",
            end_token=-1,
            stop_tokens=frozenset(),
            pad_token=-1,
            user_header="",
            lead="",
            literal=(*sorted(special, key=len, reverse=True), _ANSWER, _OPEN, _CLOSE, *_PROBES),
        )
        opening, between, request = rough._written_around()
        after, lead = between.lstrip(), opening[len(request) :]
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        marks = [mark for mark in added if after.startswith(mark)]
        end_mark = max(marks, key=len) if marks else tokenizer.eos_token or tokenizer.sep_token
        if end_mark is None:
            raise ModelError(
                "neither chat template nor tokenizer has a token that ends an answer; set the tokenizer's eos_token"
            )
        end_token = tokenizer.convert_tokens_to_ids(end_mark)
        return replace(
            rough,
            system=system,
            end_mark=end_mark,
            end_token=end_token,
            stop_tokens=frozenset({end_token, tokenizer.eos_token_id} - {None}),
            pad_token=end_token if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            user_header=after.removeprefix(end_mark).lstrip(),
            lead=lead if opening.startswith(request) and not lead.strip() else "",
        )

    def encode_prompt(self, prompt: Prompt) -> Prompt:
        """The same prompt with its tokens, up to and with what opens the assistant's turn."""
        tokens, _ = self._encode(prompt.messages)
        return replace(prompt, tokens=tuple(tokens))

    def encode_answer(self, prompt: Prompt, answer: str, finished: bool = True) -> Encoded:
        """`encode_prompt(prompt).tokens`, then the answer, then the end mark unless the answer was cut."""
        return self.encode_answers(prompt, [(answer, finished)])[0]

    def encode_answers(self, prompt: Prompt, answers: Iterable[tuple[str, bool]]) -> list[Encoded]:
        """`encode_answer` of several answers to one prompt, each with whether it is finished."""
        tokens, _ = self._encode(prompt.messages)
        written = [self._answer_ids(answer, finished) for answer, finished in answers]
        return [Encoded((*tokens, *ids), (False,) * len(tokens) + (True,) * len(ids)) for ids in written]

    def encode_demonstration(self, demonstration: Demonstration) -> Encoded:
        """The whole conversation; the mask is True on every answer and its end mark.

        The last answer follows exactly what `encode_prompt` gives for the turns before it. Answers before it stand as
        the template writes the past, which for templates that leave old reasoning out is not how they were sampled.
        """
        *before, last = demonstration.messages
        if last.role != "assistant":
            raise DataError("a demonstration ends with the assistant's turn; leave out what comes after")
        tokens, mask = self._encode(before)
        written = self._answer_ids(last.content, finished=True)
        return Encoded((*tokens, *written), (*mask, *(True for _ in written)))

    def decode(self, tokens: Sequence[int]) -> str:
        """An answer's words, without end mark and special tokens."""
        # An end mark need not be among the tokenizer's special tokens.
        words = list(tokens[:-1] if tokens and tokens[-1] in self.stop_tokens else tokens)
        text = str(self.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text.removeprefix(self.lead)

    # --- text -> tokens -----------------------------------------------------------------------------------------------

    def _encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation that the assistant is to go on with, True on its answers so far."""
        if not messages or messages[-1].role != "user":
            raise DataError("a prompt ends with a user's turn; leave out what comes after")
        tokens: list[int] = []
        mask: list[bool] = []
        pieces = self._pieces([Message(m.role, self._shielded(m.content)) for m in messages])
        bos = self.tokenizer.bos_token or self.tokenizer.cls_token
        if self._adds(bos) and not pieces[0][0].startswith(bos):
            tokens, mask = [self.tokenizer.convert_tokens_to_ids(bos)], [False]
        for text, trained in pieces:
            ids = self._ids(text)
            tokens += ids
            mask += [trained] * len(ids)
        return tokens, mask

    def _pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The rendered conversation, cut where answers begin and where their end marks end."""
        whole = self._render(messages)
        pieces, done = [], 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            marked = self._render([*messages[:index], Message("assistant", _ANSWER), *messages[index + 1 :]])
            before, found, after = marked.partition(_ANSWER)
            # What lies between an unchanged head and an unchanged tail is the answer, trimmed or not.
            end = len(whole) - len(after)
            if not found or not whole.startswith(before) or not whole.endswith(after) or end < len(before):
                raise ModelError(f"the chat template does not show where the answer in turn {index + 1} stands")
            start = len(before) - (len(self.lead) if before.endswith(self.lead) else 0)
            mark = re.compile(rf"\s*{re.escape(self.end_mark)}").match(whole, end)
            end = mark.end() if mark else end
            pieces += [(whole[done:start], False), (whole[start:end], True)]
            done = end
        return [*pieces, (whole[done:], False)]

    def _render(self, messages: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        unled = turns[0]["role"] != "system"
        if unled and self.system:
            turns.insert(0, {"role": "system", "content": self._shielded(self.system)})
        switches = {} if self.thinking is None else {"enable_thinking": self.thinking}
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, chat_template=self.source, **switches
            )
        except Exception as error:  # a template is a program, and can fail as one
            said = " ".join(str(error).split())[:160]
            raise ModelError(f"the chat template refuses the conversation ({said}); give another template") from error
        return self._without_default_system(text) if unled and self.system == "" else str(text)

    def _without_default_system(self, text: str) -> str:
        """Cut from before the first user's header, but for the mark of beginning."""
        start = text.find(self.user_header)
        if start < 0:
            raise ModelError('the chat template writes a first turn unlike others; system: "" cannot be had with it')
        bos = self.tokenizer.bos_token or ""
        kept = text[start:]
        return bos + kept if text.startswith(bos) and not kept.startswith(bos) else kept

    def _written_around(self) -> tuple[str, str, str]:
        """What the template writes between question and answer, answer and question, and to ask for an answer."""
        first, answer, second = _PROBES
        text = self._render([Message("user", first), Message("assistant", answer), Message("user", second)])
        found = re.search(f"{first}(.*?){answer}(.*?){second}(.*)", text, re.DOTALL)
        if not found:
            raise ModelError("the chat template does not write the turns in their order; give another template")
        return found[1], found[2], found[3]

    def _adds(self, bos: str | None) -> bool:
        return bos is not None and self.tokenizer("").input_ids[:1] == [self.tokenizer.convert_tokens_to_ids(bos)]

    def _shielded(self, text: str) -> str:
        """The text with every special token's name in it made a mark: words of people never become control tokens."""
        if not any(name in text for name in self.literal):
            return text
        names = "|".join(re.escape(name) for name in self.literal)
        return re.sub(names, lambda found: f"{_OPEN}{self.literal.index(found[0])}{_CLOSE}", text)

    def _ids(self, text: str) -> list[int]:
        """Tokens of rendered text; marks of `_shielded` are spelled out."""
        parts: list[str] = _SHIELD.split(text)
        template, spelled = parts[::2], [self.literal[int(index)] for index in parts[1::2]]
        ids = self._plain_ids(template[0], special=True)
        for name, rest in zip(spelled, template[1:], strict=True):
            ids += self._plain_ids(name, special=False) + self._plain_ids(rest, special=True)
        return ids

    def _plain_ids(self, text: str, *, special: bool) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids)

    def _answer_ids(self, answer: str, finished: bool) -> list[int]:
        return self._ids(self.lead + self._shielded(answer)) + ([self.end_token] if finished else [])
