"""Records -> rows of bounded length -> batches, and the order in which rows are seen."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from dressage.batches import select
from dressage.data.collate import collate_demonstrations, collate_rankings, collate_ratings
from dressage.data.order import batch_indices, length_sorted_chunks, steps_per_epoch
from dressage.data.prepare import (
    EncodedRanking,
    mismatched,
    prepare_demonstrations,
    prepare_prompts,
    prepare_rankings,
    prepare_ratings,
    split,
)
from dressage.data.template import ChatTemplate, Encoded
from dressage.errors import DataError
from dressage.schema import Demonstration, Message, Prompt, Ranking, Rating

END = 2


class Letters:
    """Just enough of a tokenizer: a letter is a token, and one token pads, ends and begins."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    chat_template = None
    bos_token, eos_token, cls_token = None, "\u0002", None
    bos_token_id, eos_token_id, pad_token_id = None, END, END

    def get_chat_template(self) -> None:
        return None

    def convert_tokens_to_ids(self, token: str) -> int:
        return ord(token)

    def __call__(self, text: str, **_: object) -> Any:
        return type("Ids", (), {"input_ids": [ord(letter) for letter in text]})

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(map(chr, tokens))

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
        words = "".join(f"{turn['content']}{'|' if turn['role'] == 'user' else self.eos_token}" for turn in turns)
        return words


@pytest.fixture
def template() -> ChatTemplate:
    """Writes "question|answer" and the end mark."""
    return ChatTemplate.of(Letters())


def demonstration(*texts: str) -> Demonstration:
    return Demonstration(tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)))


def shown(row: Encoded) -> tuple[str, str]:
    """The tokens as text, the end mark as $, and the mask."""
    text = "".join(map(chr, row.tokens)).replace(chr(END), "$")
    return text, "".join("x" if mask else "-" for mask in row.loss_mask)


# --- length -----------------------------------------------------------------------------------------------------------


def test_lengths_up_to_the_limit_are_kept(template: ChatTemplate) -> None:
    prepared = prepare_demonstrations([demonstration("ab", "cd"), demonstration("a", "b", "c", "d")], template,
                                      max_tokens=8)  # fmt: skip
    assert [shown(row) for row in prepared.rows] == [("ab|cd$", "---xxx"), ("a|b$c|d$", "--xx--xx")]
    assert (prepared.indices, prepared.dropped, prepared.cut) == ((0, 1), (), 0)
    assert prepared.summary() == "2 rows"


LONG = [
    demonstration("a", "b"),  # 4 tokens
    demonstration("a", "bcdefg"),  # 9: cut to 6, without its end mark
    demonstration("abcdef", "g"),  # the prompt is 7
    demonstration("abcde", "f"),  # the prompt is 6: no room for an answer
    demonstration("abcd", "fg"),  # 8: one letter stays
    demonstration("a", "bcd"),  # 6 with its end mark
]


def test_too_long_goes_or_loses_the_answers_end(template: ChatTemplate) -> None:
    dropped = prepare_demonstrations(LONG, template, max_tokens=6)
    assert [shown(row)[0] for row in dropped.rows] == ["a|b$", "a|bcd$"]
    assert Counter(row.reason for row in dropped.dropped) == {"answer too long": 2, "prompt too long": 2}
    assert dropped.dropped[0].where == "record 2 ('a')"
    assert dropped.indices == (0, 5)

    cut = prepare_demonstrations(LONG, template, max_tokens=6, on_too_long="cut")
    assert [shown(row) for row in cut.rows] == [
        ("a|b$", "--xx"), ("a|bcde", "--xxxx"), ("abcd|f", "-----x"), ("a|bcd$", "--xxxx")
    ]  # fmt: skip
    assert cut.cut == 2
    assert cut.summary() == "4 rows, 2 cut; left out 2: 2 prompt too long"

    with pytest.raises(DataError, match=r"record 2 \('a'\): answer too long, over 6 tokens"):
        prepare_demonstrations(LONG, template, max_tokens=6, on_too_long="error")
    with pytest.raises(DataError, match=r"record 1 \('abcdef'\): prompt too long, over 6 tokens"):
        prepare_demonstrations(LONG[2:], template, max_tokens=6, on_too_long="error")


def test_a_cut_never_reaches_an_earlier_answer(template: ChatTemplate) -> None:
    talk = demonstration("a", "bcdef", "g", "h")
    assert prepare_demonstrations([talk], template, max_tokens=6, on_too_long="cut").rows == ()


def test_rankings(template: ChatTemplate) -> None:
    three = Ranking(Prompt.of("a"), ("b", "cde", "f"), (1, 0, 1), (True, False, True))
    same = Ranking.of_pair(Prompt.of("a"), "bcdX", "bcdY")
    prompt = Ranking.of_pair(Prompt.of("abcdef"), "x", "y")
    cut = prepare_rankings([three, same, prompt], template, max_tokens=5, on_too_long="cut")
    assert [[shown(answer) for answer in row.answers] for row in cut.rows] == [
        [("a|b$", "--xx"), ("a|cde", "--xxx"), ("a|f$", "--xx")]
    ]
    assert cut.rows[0].ranks == (1, 0, 1)
    assert [row.reason for row in cut.dropped] == ["answers the same once cut", "prompt too long"]
    dropped = prepare_rankings([three, same, prompt], template, max_tokens=4)
    assert (dropped.rows, len(dropped.dropped)) == ((), 3)
    with pytest.raises(DataError, match="record 2"):
        prepare_rankings([three, same], template, max_tokens=5, on_too_long="error")


def test_ratings_come_with_another_prompts_answer(template: ChatTemplate) -> None:
    asked = [Rating(Prompt.of(p), a, good, end) for p, a, good, end in
             (("q", "yes", True, True), ("r", "no", False, False), ("q", "long answer", False, True))]  # fmt: skip
    prepared = prepare_ratings(asked, template, max_tokens=9)
    assert [reason.reason for reason in prepared.dropped] == ["answer too long"]
    assert [row.good for row in prepared.rows] == [True, False]
    texts = [[shown(answer) for answer in row.answers] for row in prepared.rows]
    assert texts == [
        [("q|yes$", "--xxxx"), ("q|no", "--xx")],
        [("r|no", "--xx"), ("r|yes$", "--xxxx")],
    ]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99)), min_size=1, max_size=12))
def test_unrelated_answers_are_used_once_and_are_another_prompts(rows: list[tuple[int, int]]) -> None:
    """Prompt p is the token p, answer a the tokens 100 + a and p: it shows whose it was."""
    encoded = [Encoded((p, 100 + a, p), (False, True, True)) for p, a in rows]
    found = mismatched(encoded, max_tokens=3)
    assert [row.tokens[0] for row in found] == [p for p, _ in rows]
    assert Counter(row.tokens[1:] for row in found) == Counter(row.tokens[1:] for row in encoded)
    assert all(row.loss_mask == (False, True, True) for row in found)
    if max(Counter(p for p, _ in rows).values()) <= len(rows) / 2:
        assert all(row.tokens[0] != row.tokens[2] for row in found)


def test_an_unrelated_answer_is_cut_to_fit() -> None:
    short, long = Encoded((7, 7, 1), (False, False, True)), Encoded((8, 2, 3, 4), (False, True, True, True))
    found = mismatched([short, long], max_tokens=4)
    assert found == [Encoded((7, 7, 2, 3), (False, False, True, True)), Encoded((8, 1), (False, True))]
    empty = Encoded((7, 7), (False, False))
    assert mismatched([empty, long], max_tokens=5)[1] == Encoded((8,), (False,))


def test_prompts(template: ChatTemplate) -> None:
    prompts = [Prompt.of("abc"), Prompt.of("abcd")]
    for policy in ("drop", "cut"):
        prepared = prepare_prompts(prompts, template, max_tokens=4, on_too_long=policy)  # type: ignore[arg-type]
        assert [prompt.tokens for prompt in prepared.rows] == [tuple(map(ord, "abc|"))]
        assert prepared.summary() == "1 rows; left out 1: 1 prompt too long"
    with pytest.raises(DataError, match=r"record 2 \('abcd'\): prompt too long"):
        prepare_prompts(prompts, template, max_tokens=4, on_too_long="error")


# --- split ------------------------------------------------------------------------------------------------------------

talks = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from("xyz")).map(lambda t: demonstration(str(t[0]), t[1], "again", "z")),
    min_size=2,
    max_size=60,
)


def opening(record: Demonstration) -> str:
    return record.messages[0].content


@given(talks, st.integers(0, 5), st.sampled_from([{"fraction": 0.3}, {"fraction": 0.0}, {"count": 1}]))
def test_no_opening_is_on_both_sides(records: list[Demonstration], seed: int, size: dict[str, Any]) -> None:
    train, held = split(records, seed=seed, **size)
    assert not {opening(r) for r in train} & {opening(r) for r in held}
    assert Counter(train) + Counter(held) == Counter(records)
    assert list(train) == [r for r in records if r in set(train)]


def test_the_sides_of_a_fraction_hold_when_the_file_grows() -> None:
    first = [Prompt.of(f"question {n}") for n in range(2000)]
    train, held = split(first, fraction=0.1, seed=7)
    assert len(held) == pytest.approx(200, abs=5 * 13.4)  # five standard deviations of a binomial
    grown = [Prompt.of(f"new {n}") for n in range(500)] + first[::-1]
    assert set(held) <= set(split(grown, fraction=0.1, seed=7)[1])
    assert set(held) != set(split(first, fraction=0.1, seed=8)[1])
    # And in the next stage: the ranking of a held-out prompt is held out, whatever its system turn.
    rankings = [Ranking.of_pair(Prompt.of(p.text, system="s"), "a", "b") for p in first]
    assert {r.prompt.text for r in split(rankings, fraction=0.1, seed=7)[1]} == {p.text for p in held}
    assert len(train) + len(held) == 2000


def test_a_count_is_exact() -> None:
    records = [Prompt.of(f"{n}") for n in range(50)]
    train, held = split(records, count=7, seed=0)
    assert (len(train), len(held)) == (43, 7)
    assert split(records[::-1], count=7, seed=0)[1] == held[::-1]


def test_what_cannot_be_split() -> None:
    records = [Prompt.of("a"), Prompt.of("b")]
    with pytest.raises(DataError, match="cannot hold out 2 of 2"):
        split(records, count=2, seed=0)
    with pytest.raises(DataError, match="fraction of 1"):
        split(records, fraction=1.0, seed=0)
    with pytest.raises(ValueError, match="one of them"):
        split(records, seed=0)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_demonstrations_by_hand() -> None:
    """The end mark is also the padding: only lengths tell them apart."""
    rows = [Encoded((5, END, END), (False, True, True)), Encoded((7,), (False,))]
    batch = collate_demonstrations(rows, pad_token=END)
    assert_close(batch.tokens, torch.tensor([[5, END, END], [7, END, END]]))
    assert_close(batch.attention_mask, torch.tensor([[True] * 3, [True, False, False]]))
    assert_close(batch.loss_mask, torch.tensor([[False, True, True], [False] * 3]))


def test_rankings_by_hand() -> None:
    def row(*tokens: int) -> Encoded:
        return Encoded(tokens, (False,) + (True,) * (len(tokens) - 1))

    rows = [
        EncodedRanking((row(5, END), row(5, 6, END), row(5, END, END, END)), (1, 0, 1)),
        EncodedRanking((row(7, 8), row(7, END)), (0, 1)),
    ]
    batch = collate_rankings(rows, pad_token=END)
    assert_close(batch.last, torch.tensor([1, 2, 3, 1, 1]))
    assert_close(batch.group, torch.tensor([0, 0, 0, 1, 1]))
    assert_close(batch.rank, torch.tensor([1, 0, 1, 0, 1]))
    assert_close(batch.attention_mask.sum(-1), batch.last + 1)
    assert_close(batch.response_mask.sum(-1), batch.last)
    assert_close(batch.tokens[3], torch.tensor([7, 8, END, END]))
    assert batch.grade is None
    graded = collate_rankings([rows[0], replace(rows[1], grades=(2.5, 1.0))], pad_token=END).grade
    assert graded is not None and graded[3:].tolist() == [2.5, 1.0] and bool(graded[:3].isnan().all())
    part = select(batch, torch.tensor([3, 4]))
    assert_close(part.group, torch.tensor([1, 1]))


def test_ratings_by_hand(template: ChatTemplate) -> None:
    """Each rated answer and its unrelated one are neighbours, with what the reference says of them."""
    asked = [Rating(Prompt.of("q"), "yes", True), Rating(Prompt.of("r"), "n", False)]
    rows = prepare_ratings(asked, template, max_tokens=9).rows
    batch = collate_ratings(rows, END)
    assert batch.rating.tolist() == [1, 0, -1, 0]
    assert batch.response_mask.sum(-1).tolist() == [4, 2, 2, 4] and batch.ref_answer_logprobs is None
    asked_twice = [replace(row, ref_answer_logprobs=(-1.0 - n, -3.0 - n)) for n, row in enumerate(rows)]
    reference = collate_ratings(asked_twice, END).ref_answer_logprobs
    assert reference is not None and reference.tolist() == [-1.0, -3.0, -2.0, -4.0]


def test_padding_changes_nothing(template: ChatTemplate) -> None:
    """The rows can be had back from a batch, whatever they are padded with."""
    rows = prepare_demonstrations(LONG, template, max_tokens=100).rows
    for pad in (END, ord("a")):
        batch = collate_demonstrations(rows, pad)
        back = [
            Encoded(tuple(tokens[kept].tolist()), tuple(mask[kept].tolist()))
            for tokens, kept, mask in zip(batch.tokens, batch.attention_mask, batch.loss_mask, strict=True)
        ]
        assert tuple(back) == rows


# --- order ------------------------------------------------------------------------------------------------------------

sizes = {"n_rows": st.integers(1, 40), "batch_size": st.integers(1, 12), "seed": st.integers(0, 99)}


@given(epoch=st.integers(0, 3), **sizes)
def test_an_epoch_sees_every_row_once(n_rows: int, batch_size: int, seed: int, epoch: int) -> None:
    steps = steps_per_epoch(n_rows, batch_size)
    batches = [batch_indices(n_rows, batch_size, epoch * steps + step, seed) for step in range(steps)]
    assert sorted(row for batch in batches for row in batch) == list(range(n_rows))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches[-1]) == (n_rows - 1) % batch_size + 1


def test_the_order_needs_the_step_alone() -> None:
    whole = [batch_indices(100, 8, step, seed=3) for step in range(40)]
    alone = random.Random(0).sample(range(40), 40)
    assert all(batch_indices(100, 8, step, seed=3) == whole[step] for step in alone)
    # Written down once: a run begun with one version of the code must go on alike with the next.
    assert whole[0] == FIRST_BATCH
    epochs = {tuple(row for batch in whole[start : start + 13] for row in batch) for start in (0, 13, 26)}
    assert len(epochs) == 3
    assert batch_indices(100, 8, 0, seed=4) != whole[0]
    whole[0].append(-1)
    assert batch_indices(100, 8, 0, seed=3) == FIRST_BATCH


FIRST_BATCH = [20, 24, 89, 43, 92, 54, 80, 45]

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(lengths, st.integers(1, 120), st.integers(1, 4) | st.none())
def test_chunks_keep_the_budget(lengths: list[int], budget: int, group_size: int | None) -> None:
    group = None if group_size is None else [row // group_size for row in range(len(lengths))]
    chunks = length_sorted_chunks(lengths, budget, group)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        padded = max(lengths[row] for row in chunk) * len(chunk)
        assert padded <= budget or len({row if group is None else group[row] for row in chunk}) == 1
    if group is not None:
        assert all(len({n for n, chunk in enumerate(chunks) for row in chunk if group[row] == g}) == 1 for g in group)


def test_chunks_by_hand() -> None:
    assert length_sorted_chunks([3, 9, 4, 8, 3, 20], 18) == [[5], [1, 3], [2, 0, 4]]
    assert length_sorted_chunks([3, 9, 4, 8], 18, group=["a", "b", "b", "a"]) == [[1, 2], [0, 3]]
    assert length_sorted_chunks([], 10) == []
    # Two are enough, and 4 + 4 takes less memory than 7 + 1.
    assert length_sorted_chunks([10] * 8, 79) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # With room for one more in the first it would be 30 and 10; so it is 20 and 15.
    assert length_sorted_chunks([5, 9, 5, 10, 5], 39) == [[3, 1], [0, 2, 4]]


def test_chunks_lose_little() -> None:
    """Of the computed tokens about a tenth is padding; cut in the order given, half and more is."""
    drawn = random.Random(0)
    lengths = [int(drawn.lognormvariate(4, 0.7)) + 5 for _ in range(512)]
    chunks = length_sorted_chunks(lengths, 4096)
    unsorted = [range(start, start + 64) for start in range(0, 512, 64)]
    useful = [
        sum(lengths) / sum(max(lengths[row] for row in rows) * len(rows) for rows in cut) for cut in (chunks, unsorted)
    ]
    assert useful[0] > 0.85
    assert useful[1] < 0.5


def test_encoded_rows_are_values() -> None:
    """Equal rows are equal: duplicates after encoding can be found."""
    row = Encoded((1, 2), (False, True))
    assert len({row, replace(row)}) == 1
