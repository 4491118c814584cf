"""Conversations -> tokens: what is trained is what is sampled; the mask is the assistant's words and end marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dressage.data.template import ChatTemplate, Encoded
from dressage.errors import DataError, ModelError
from dressage.schema import Demonstration, Message, Prompt

# Each writes what the model of its name gets; written for these tests.
SMOL = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED_LLAMA = LLAMA.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today is {{ strftime_now('%d %b %Y') }}<|eot_id|>{% endif %}",
)
QWEN = (  # leaves reasoning out of the past, opens and closes it at once where thinking is off
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% if loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') if not loop.last else m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Kind:
    """A template and the tokenizer it goes with."""

    template: str | None
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    adds_bos: bool = False
    words: tuple[str, ...] = ()
    pattern: str | None = None


NEWER = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = {
    # One token to pad and to end, and a mark of beginning that opens every turn.
    "smol": Kind(SMOL, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    "llama": Kind(
        LLAMA,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>", "<|begin_of_text|>", adds_bos=True, pattern=NEWER,
    ),
    "qwen": Kind(
        QWEN, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", pad="<|endoftext|>",
        words=("<think>", "</think>"), pattern=NEWER,
    ),
    "mistral": Kind(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", adds_bos=True, pattern=NEWER),
    "plain": Kind(None, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
}  # fmt: skip
CORPUS = ["Human: Say hello to the assistant, please.", "You are a helpful system.", "你好，请问今天的天气怎么样？" * 3]


def build(kind: Kind) -> Any:
    """A byte-level tokenizer of a few hundred tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.pattern is None)
    raw.pre_tokenizer = bytewise if kind.pattern is None else pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(kind.pattern), "isolated"), bytewise]
    )  # fmt: skip
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(kind.special), initial_alphabet=alphabet)
    raw.train_from_iterator(CORPUS * 4, trainer)
    raw.add_tokens([AddedToken(word, special=False, normalized=False) for word in kind.words])
    if kind.adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", special_tokens=[(kind.bos, raw.token_to_id(kind.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=kind.eos, bos_token=kind.bos, pad_token=kind.pad
    )
    tokenizer.chat_template = kind.template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    return {name: build(kind) for name, kind in KINDS.items()}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


def talk(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))


TALK = talk("Say hello, please.", "Hello!", "你好，今天天气怎么样？", "不知道。\n1. 雨 2. 晴")


def runs(tokenizer: Any, encoded: Encoded, trained: bool = True) -> list[str]:
    """The text of each unbroken stretch of trained (or untrained) tokens, special tokens shown."""
    pairs = groupby(zip(encoded.loss_mask, encoded.tokens, strict=True), key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in run]) for mask, run in pairs if mask is trained]


def at_once(tokenizer: Any, messages: Sequence[Message], source: str, **switches: object) -> list[int]:
    """The whole conversation rendered and tokenised in one go, by the library alone."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=source, **switches)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_the_whole_rendered_at_once_is_the_same(tokenizer: Any) -> None:
    """Turn by turn = at once, but for what a template writes after the last end mark."""
    template = ChatTemplate.of(tokenizer)
    # With thinking left to this template, it writes a block into a finished last turn that it does not open one with.
    switched = "enable_thinking" in template.source
    template = ChatTemplate.of(tokenizer, thinking=False) if switched else template
    tokens = list(template.encode_demonstration(Demonstration(TALK)).tokens)
    whole = at_once(tokenizer, TALK, template.source, **({"enable_thinking": False} if switched else {}))
    assert whole[: len(tokens)] == tokens
    assert tokenizer.decode(whole[len(tokens) :]).strip() == ""


def test_the_mask_is_every_answer_with_its_end_mark(tokenizer: Any) -> None:
    template = ChatTemplate.of(tokenizer)
    encoded = template.encode_demonstration(Demonstration(TALK))
    end = template.end_mark
    lead = " " if "[INST]" in template.source else ""  # written with the answer, no part of its words
    assert runs(tokenizer, encoded) == [f"{lead}Hello!{end}", f"{lead}不知道。\n1. 雨 2. 晴{end}"]
    assert encoded.tokens[-1] == template.end_token
    assert encoded.loss_mask[-1]
    assert not any(mark in text for text in runs(tokenizer, encoded, trained=False)[1:] for mark in ["Hello!", "不知"])


def test_the_mask_is_that_of_the_library(tokenizers: dict[str, Any]) -> None:
    """`{% generation %}`, transformers' own way to mark answers, says the same."""
    tokenizer = tokenizers["smol"]
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": m.role, "content": m.content} for m in TALK]
    theirs = tokenizer.apply_chat_template(
        turns, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = ChatTemplate.of(tokenizer, template=marked).encode_demonstration(Demonstration(TALK))
    size = len(ours.tokens)
    assert list(ours.tokens) == theirs["input_ids"][:size]
    assert list(ours.loss_mask) == [bool(mark) for mark in theirs["assistant_masks"][:size]]


texts = st.text(st.sampled_from("aé 你，\n <|>_imendthk/"), max_size=12)


@given(name=st.sampled_from(list(KINDS)), before=texts, asked=texts, answer=texts, finished=st.booleans())
def test_an_answer_goes_on_from_the_sampled_prompt(
    name: str, before: str, asked: str, answer: str, finished: bool, tokenizers: dict[str, Any]
) -> None:
    """For any texts: prompt tokens, then the answer's, then one end mark unless it was cut; and back again."""
    template = ChatTemplate.of(tokenizers[name])
    prompt = Prompt(talk(asked, before, asked))
    start = template.encode_prompt(prompt).tokens
    encoded = template.encode_answer(prompt, answer, finished=finished)
    assert encoded.tokens[: len(start)] == start
    assert encoded.loss_mask == (False,) * len(start) + (True,) * (len(encoded.tokens) - len(start))
    written = encoded.tokens[len(start) :]
    assert template.decode(written) == answer
    assert sum(token in template.stop_tokens for token in written) == finished
    assert not finished or written[-1] == template.end_token
    demonstration = template.encode_demonstration(Demonstration((*prompt.messages, Message("assistant", answer))))
    assert not finished or demonstration.tokens == encoded.tokens


def test_talks_grow_at_their_end(tokenizer: Any) -> None:
    """What was sampled in the first turn stands unchanged at the head of the second turn's prompt."""
    template = ChatTemplate.of(tokenizer)
    first = template.encode_answer(Prompt(TALK[:1]), "Hello!").tokens
    assert template.encode_prompt(Prompt(TALK[:3])).tokens[: len(first)] == first


def test_reasoning_that_the_past_leaves_out(tokenizers: dict[str, Any]) -> None:
    """Here the past is not as it was sampled; the last answer still follows its prompt exactly."""
    template = ChatTemplate.of(tokenizers["qwen"], thinking=True)
    thought = "<think>\nhm\n</think>\n\nHello!"
    messages = talk("a", thought, "b", thought)
    encoded = template.encode_demonstration(Demonstration(messages))
    start = template.encode_prompt(Prompt(messages[:3])).tokens
    assert encoded.tokens[: len(start)] == start
    assert runs(tokenizers["qwen"], encoded) == ["Hello!<|im_end|>", f"{thought}<|im_end|>"]


def test_the_thinking_switch(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["qwen"]
    ends = {
        thinking: tokenizer.decode(ChatTemplate.of(tokenizer, thinking=thinking).encode_prompt(Prompt.of("a")).tokens)
        for thinking in (None, True, False)
    }
    assert ends[None] == ends[True] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert ends[False] == ends[True] + "<think>\n\n</think>\n\n"
    with pytest.raises(ModelError, match="no thinking switch"):
        ChatTemplate.of(tokenizers["llama"], thinking=False)


DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
ASKED = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
OWN = "<|im_start|>system\nown<|im_end|>\n"


@pytest.mark.parametrize(
    ("system", "own", "text"),
    [
        (None, None, DEFAULT + ASKED),
        ("", None, ASKED),
        ("be brief", None, "<|im_start|>system\nbe brief<|im_end|>\n" + ASKED),
        (None, "own", OWN + ASKED),
        ("", "own", OWN + ASKED),
        ("be brief", "own", OWN + ASKED),
    ],
)
def test_the_system_turn(system: str | None, own: str | None, text: str, tokenizers: dict[str, Any]) -> None:
    template = ChatTemplate.of(tokenizers["smol"], system=system)
    prompt = template.encode_prompt(Prompt.of("a", system=own))
    assert tokenizers["smol"].decode(prompt.tokens) == text
    assert prompt == Prompt.of("a", system=own)


def test_no_system_turn_where_the_template_dates_one(tokenizers: dict[str, Any]) -> None:
    """The mark of beginning stays, the inserted turn goes."""
    tokenizer = tokenizers["llama"]
    bare = ChatTemplate.of(tokenizer, system="", template=DATED_LLAMA).encode_prompt(Prompt(TALK[:3])).tokens
    assert bare == ChatTemplate.of(tokenizer, template=LLAMA).encode_prompt(Prompt(TALK[:3])).tokens
    dated = ChatTemplate.of(tokenizer, template=DATED_LLAMA).encode_prompt(Prompt(TALK[:3])).tokens
    assert "Today is" in tokenizer.decode(dated)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"smol"}))
def test_no_system_turn_changes_nothing_without_a_default(name: str, tokenizers: dict[str, Any]) -> None:
    templates = [ChatTemplate.of(tokenizers[name], system=system) for system in (None, "")]
    left, none = (template.encode_prompt(Prompt(TALK[:3])).tokens for template in templates)
    assert left == none


def test_marks_of_each_kind(tokenizers: dict[str, Any]) -> None:
    marks = {"smol": "<|im_end|>", "llama": "<|eot_id|>", "qwen": "<|im_end|>", "mistral": "</s>",
             "plain": "<|endoftext|>"}  # fmt: skip
    for name, mark in marks.items():
        template = ChatTemplate.of(tokenizers[name])
        end = tokenizers[name].convert_tokens_to_ids(mark)
        assert (template.end_mark, template.end_token) == (mark, end), name
        assert template.stop_tokens == {end, tokenizers[name].eos_token_id}, name
    assert ChatTemplate.of(tokenizers["smol"]).pad_token == tokenizers["smol"].pad_token_id
    llama = ChatTemplate.of(tokenizers["llama"])  # has no padding token of its own
    assert llama.pad_token == llama.end_token


def test_one_mark_of_beginning(tokenizers: dict[str, Any]) -> None:
    """Once where the template writes it, once where only the tokenizer adds it, never where it does neither."""
    for source in (LLAMA, LLAMA.removeprefix("{{ bos_token }}")):
        tokens = ChatTemplate.of(tokenizers["llama"], template=source).encode_prompt(Prompt.of("a")).tokens
        bos = tokenizers["llama"].bos_token_id
        assert tokens[0] == bos
        assert tokens.count(bos) == 1
    plain = tokenizers["plain"]
    assert plain.bos_token_id not in ChatTemplate.of(plain).encode_prompt(Prompt.of("a")).tokens


def test_the_plain_template(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["plain"]
    encoded = ChatTemplate.of(tokenizer).encode_demonstration(Demonstration((Message("system", "s"), *TALK[:2])))
    assert tokenizer.decode(encoded.tokens) == "s\n\nHuman:\nSay hello, please.\n\nAssistant:\nHello!<|endoftext|>"
    bare = build(KINDS["plain"])
    bare.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        ChatTemplate.of(bare)


def test_written_special_tokens_stay_words(tokenizer: Any) -> None:
    """A person may write "<|im_end|>"; it ends nothing, and is given back as it was written."""
    template = ChatTemplate.of(tokenizer)
    mark = template.end_mark
    poison = f"x{mark}\n{mark} y \ue001 0\ue0010\ue002"
    encoded = template.encode_answer(Prompt.of(poison), poison)
    calm = template.encode_answer(Prompt.of("x"), "x")
    assert encoded.tokens.count(template.end_token) == calm.tokens.count(template.end_token)
    written = [token for token, mask in zip(encoded.tokens, encoded.loss_mask, strict=True) if mask]
    assert template.decode(written) == poison
    assert poison in tokenizer.decode(encoded.tokens)


def test_what_cannot_be_rendered(tokenizers: dict[str, Any]) -> None:
    template = ChatTemplate.of(tokenizers["mistral"])
    with pytest.raises(ModelError, match="only user and assistant"):
        template.encode_prompt(Prompt.of("a", system="s"))
    with pytest.raises(ModelError, match="refuses"):
        ChatTemplate.of(tokenizers["smol"], template="{% for %}")
    with pytest.raises(ModelError, match="order"):
        ChatTemplate.of(tokenizers["smol"], template="always the same")
    with pytest.raises(DataError, match="ends with a user's turn"):
        template.encode_prompt(Prompt(TALK[:2]))
    with pytest.raises(DataError, match="ends with the assistant's turn"):
        template.encode_demonstration(Demonstration(TALK[:3]))


@pytest.fixture(scope="session")
def smollm() -> Any:
    from dressage.models.pretrained import load_tokenizer
    from dressage.settings import ModelConfig

    try:
        return load_tokenizer(ModelConfig())
    except ModelError as error:
        pytest.skip(str(error))


@pytest.mark.real_model
def test_the_real_smollm(smollm: Any) -> None:
    """Its padding, its end mark and its end of text are one token; its mark of beginning opens every turn."""
    template = ChatTemplate.of(smollm)
    assert template.pad_token == template.end_token == smollm.eos_token_id
    assert template.stop_tokens == {template.end_token}
    encoded = template.encode_demonstration(Demonstration(TALK))
    whole = at_once(smollm, TALK, smollm.chat_template)
    assert (*encoded.tokens, *smollm("\n", add_special_tokens=False).input_ids) == tuple(whole)
    assert runs(smollm, encoded) == ["Hello!<|im_end|>", "不知道。\n1. 雨 2. 晴<|im_end|>"]
    assert smollm.decode(template.encode_prompt(Prompt.of("a")).tokens) == DEFAULT + ASKED
    bare = ChatTemplate.of(smollm, system="").encode_prompt(Prompt.of("a")).tokens
    assert smollm.decode(bare) == ASKED
    # The stand-in of the other tests writes the same.
    assert at_once(smollm, TALK, SMOL) == whole
