"""The quickstart's own prompts and demonstrations keep the promises of their README."""

import json
import re
from itertools import chain, combinations, product

import pytest

from dressage import material
from dressage.errors import DataError
from dressage.feedback.annotator import gold_score

ROWS = {
    "prompts_train.jsonl": 300,
    "prompts_heldout.jsonl": 120,
    "demonstrations.jsonl": 150,
    "prompts_zh.jsonl": 40,
    "demonstrations_zh.jsonl": 40,
}


def rows(name: str) -> list[dict[str, str]]:
    with material.path(name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prompts(name: str) -> list[str]:
    return [row["prompt"] for row in rows(name)]


def word_set(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z']+", text.lower()))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("name", ROWS)
def test_counts_fields_and_clean_text(name: str) -> None:
    fields = {"prompt", "completion"} if name.startswith("demonstrations") else {"prompt"}
    found = rows(name)
    assert len(found) == ROWS[name]
    for row in found:
        assert set(row) == fields
        for text in row.values():
            assert text == " ".join(text.split())
            assert "<|" not in text
            assert text[-1] in ".?!。？！"


def test_no_prompt_stands_twice() -> None:
    every = list(chain.from_iterable(prompts(name) for name in ROWS))
    assert len({prompt.casefold() for prompt in every}) == len(every)


@pytest.mark.parametrize("name", ["prompts_train.jsonl", "prompts_heldout.jsonl", "demonstrations.jsonl"])
def test_english_prompts_are_short(name: str) -> None:
    assert [prompt for prompt in prompts(name) if not 6 <= len(prompt.split()) <= 14] == []


def test_heldout_and_demonstration_prompts_are_unlike_the_rest() -> None:
    heldout, train, shown = (
        [word_set(prompt) for prompt in prompts(name)]
        for name in ("prompts_heldout.jsonl", "prompts_train.jsonl", "demonstrations.jsonl")
    )
    pairs = chain(product(heldout, train), product(heldout, shown), product(shown, train), combinations(heldout, 2))
    assert max(jaccard(one, other) for one, other in pairs) < 0.75


def test_english_completions_are_short_and_open_in_many_ways() -> None:
    completions = [row["completion"] for row in rows("demonstrations.jsonl")]
    assert [text for text in completions if not 15 <= len(text.split()) <= 35] == []
    openings = {" ".join(text.split()[:2]) for text in completions}
    assert len(openings) > 0.75 * len(completions)


def test_chinese_is_chinese_and_short() -> None:
    for row in rows("demonstrations_zh.jsonl"):
        assert re.search(r"[a-zA-Z]", row["prompt"] + row["completion"]) is None
        assert 20 <= len(row["completion"]) <= 60


@pytest.mark.parametrize(("name", "room"), [("demonstrations.jsonl", 1.0), ("demonstrations_zh.jsonl", 1.0)])
def test_demonstrations_are_finished_answers_that_leave_room_for_friendliness(name: str, room: float) -> None:
    scores = [gold_score(row["prompt"], row["completion"], finished=True) for row in rows(name)]
    assert all(score.parts["finished"] == 1.0 for score in scores)
    assert min(score.parts["sense"] for score in scores) > 0.5
    assert sum(score.parts["friendly"] for score in scores) / len(scores) < 0.25
    assert 0.0 < sum(score.total for score in scores) / len(scores) < 2.0 - room


def test_an_unknown_name_is_answered_with_what_there_is() -> None:
    with pytest.raises(DataError, match=r"demonstrations_zh\.jsonl"):
        material.path("demonstration.jsonl")
