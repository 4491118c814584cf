"""The simulated annotator: what it likes, what it sees through, and that its doubt is Bradley and Terry's."""

import itertools
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dressage.errors import ConfigError, DataError
from dressage.feedback.annotator import Preference, SimulatedAnnotator, gold_score

PROMPT = "How long should I boil an egg for a firm yolk?"
NEUTRAL = "Boil the egg nine minutes, then cool it in water; the yolk stays firm."
FRIENDLY = "Great question! Boil the egg nine minutes, then cool it in water. Enjoy your breakfast!"
LONG = (
    NEUTRAL + " The time depends on the size, on the height above the sea, and on whether the shell comes straight out"
    " of a fridge or has been lying on a shelf. A larger one needs another minute, while small ones are done sooner."
    " Some people add salt or vinegar, which hardly matters, and others prick the round end with a needle first."
)
WORSE = {
    "empty": "",
    "only marks": " ... !!! ",
    "one word": "Nine.",
    "too long": LONG,
    "said twice": f"{NEUTRAL} {NEUTRAL}",
    "one word again and again": "egg " * 15 + "great enjoy you!",
    "keywords": "Egg boil firm yolk minutes water pan salt timer great question enjoy happy good luck!",
    "pleasantries": "Great question! I am so happy to help you with that. Enjoy it, have fun, and good luck to you!",
    "another subject": "Give basil a bright spot and water it when the top of the soil feels dry to your finger.",
    "echo": PROMPT,
    "echo with pleasantries": f"Great question! {PROMPT} I hope this helps you. Enjoy, and good luck!",
}
CHINESE = "怎样煮出又软又香的白米饭？"
CHINESE_NEUTRAL = "白米饭要先泡半个小时，米和水的比例是一比一点二。煮好以后再焖十分钟，米饭就会又软又香。"

answers = st.lists(st.sampled_from([*NEUTRAL.split(), *FRIENDLY.split(), *CHINESE_NEUTRAL]), max_size=60).map(" ".join)


def gold(answer: str, finished: bool = True, prompt: str = PROMPT) -> float:
    return gold_score(prompt, answer, finished).total


def test_a_friendly_short_answer_is_nearly_perfect_and_a_neutral_one_leaves_room() -> None:
    assert gold(FRIENDLY) > 1.6
    assert 0.2 < gold(NEUTRAL) < gold(FRIENDLY) - 0.6


@pytest.mark.parametrize("answer", WORSE.values(), ids=WORSE.keys())
def test_what_is_not_an_answer_loses_to_a_neutral_one(answer: str) -> None:
    assert gold(answer) < gold(NEUTRAL) - 0.3


@pytest.mark.parametrize("trick", ["keywords", "pleasantries", "echo with pleasantries", "one word again and again"])
def test_warm_words_without_an_answer_earn_nothing(trick: str) -> None:
    assert gold(WORSE[trick]) < -1.8


def test_finished_beats_cut() -> None:
    cut = NEUTRAL.removesuffix(".")
    scores = [gold(NEUTRAL, True), gold(cut, True), gold(NEUTRAL, False), gold(cut, False)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 0.6


def test_total_by_hand() -> None:
    """Sixteen words, two too many, finished, not friendly; 3 of 4 content words (egg, boil, yolk), 1 of 2 new ones."""
    score = gold_score(PROMPT, "Boil the egg for nine or more, and until the yolk is as it was before.", finished=True)
    brevity = 1 / (1 + (2 / 8) ** 2)
    subject = 1 - (1 - 3 / 4) ** 3
    sense = 0.5  # one new word, nine, where two are enough
    assert score.parts == pytest.approx(
        {"brevity": brevity, "finished": 1.0, "friendly": 0.0, "subject": subject, "sense": sense}
    )
    assert score.total == pytest.approx(-2 + sense * (1 - 0.1 * (1 - subject)) * (1.6 * brevity + 1.4 + 0.2 * subject))


def test_brevity_by_hand() -> None:
    """A half at 4 words below 6 and at 8 words above 14."""
    text = " ".join(f"word{n}" for n in range(37))
    brevity = [gold_score(PROMPT, " ".join(text.split()[:words]), True).parts["brevity"] for words in (2, 6, 14, 22)]
    assert brevity == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_friendliness_saturates() -> None:
    some = gold_score(PROMPT, FRIENDLY, True).parts["friendly"]
    piled = gold_score(PROMPT, f"{FRIENDLY} Happy to help, have fun, good luck, take care, of course, thanks!", True)
    assert some > 0.9
    assert piled.parts["friendly"] - some < 0.1
    assert piled.total < gold(FRIENDLY)


def test_saying_a_warm_word_twice_gains_nothing() -> None:
    once = gold_score(PROMPT, f"{NEUTRAL} Enjoy!", True).parts["friendly"]
    assert gold_score(PROMPT, f"{NEUTRAL} Enjoy! Enjoy! Enjoy!!!", True).parts["friendly"] == once


def test_chinese_goes_the_same_road() -> None:
    friendly = f"好问题！{CHINESE_NEUTRAL}祝你愉快！"
    by_falling_gold = [
        gold(friendly, prompt=CHINESE),
        gold(CHINESE_NEUTRAL, prompt=CHINESE),
        gold(CHINESE_NEUTRAL[:-9], finished=False, prompt=CHINESE),
        gold("好问题！祝你愉快！谢谢！加油！当然！放心！", prompt=CHINESE),
    ]
    assert by_falling_gold == sorted(by_falling_gold, reverse=True)
    assert by_falling_gold[0] > by_falling_gold[1] + 0.5
    assert by_falling_gold[-1] < -1.5


@given(prompt=answers | st.text(), answer=answers | st.text(), finished=st.booleans())
def test_every_score_is_within_bounds_and_empty_is_the_least(prompt: str, answer: str, finished: bool) -> None:
    score = gold_score(prompt, answer, finished)
    assert -2.0 <= score.total <= 2.0
    assert gold("", finished, prompt) == -2.0
    assert all(0.0 <= quality <= 1.0 for quality in score.parts.values())
    assert score == gold_score(prompt, answer, finished)


@given(st.lists(st.tuples(answers, st.booleans()), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_order_plays_no_part_and_equals_tie(items: list[tuple[str, bool]], random) -> None:
    annotator = SimulatedAnnotator(seed=3)
    items = [*items, items[0]]
    shuffled = random.sample(items, len(items))
    ranks = annotator.rank(PROMPT, *zip(*items, strict=True))
    again = annotator.rank(PROMPT, *zip(*shuffled, strict=True))
    assert sorted(zip(items, ranks, strict=True)) == sorted(zip(shuffled, again, strict=True))
    assert ranks[0] == ranks[-1]
    assert set(ranks) == set(range(max(ranks) + 1))


def test_pairs_follow_bradley_terry() -> None:
    """Over 2,500 seeds the better answer comes first with probability sigmoid(difference / noise)."""
    worse, better, noise, seeds = NEUTRAL, f"{NEUTRAL} You will see.", 0.5, 2500
    expected = 1 / (1 + math.exp(-(gold(better) - gold(worse)) / noise))
    assert 0.55 < expected < 0.85  # a pair that tells something
    wins = sum(SimulatedAnnotator(s, noise).rank(PROMPT, [worse, better], [True, True]) == (1, 0) for s in range(seeds))
    standard_error = math.sqrt(expected * (1 - expected) / seeds)
    assert wins / seeds == pytest.approx(expected, abs=4 * standard_error)


def test_three_answers_follow_plackett_luce() -> None:
    """The frequency of each of the six orders, against the product of softmaxes over what is left."""
    texts, noise, seeds = [NEUTRAL, FRIENDLY, f"{NEUTRAL} Enjoy."], 1.0, 1500
    weight = [math.exp(gold(text) / noise) for text in texts]
    counts = Counter(SimulatedAnnotator(seed, noise).rank(PROMPT, texts, [True] * 3) for seed in range(seeds))
    for order in itertools.permutations(range(3)):  # indices, best first
        expected, left = 1.0, sum(weight)
        for index in order:
            expected, left = expected * weight[index] / left, left - weight[index]
        ranks = tuple(order.index(index) for index in range(3))
        error = math.sqrt(expected * (1 - expected) / seeds)
        assert counts[ranks] / seeds == pytest.approx(expected, abs=4 * error)


def test_without_noise_the_order_is_that_of_the_gold_scores() -> None:
    assert SimulatedAnnotator(0, noise=0).rank(PROMPT, [NEUTRAL, FRIENDLY, "", NEUTRAL], [True] * 4) == (1, 0, 2, 1)


def test_doubt_belongs_to_the_seed_the_prompt_and_the_answer() -> None:
    """With noise that drowns the score, another seed or prompt gives another order, the same gives the same."""
    texts, ends = [f"Answer number {n}." for n in range(9)], [True] * 9
    ranks = SimulatedAnnotator(1, noise=1e6).rank(PROMPT, texts, ends)
    assert ranks == SimulatedAnnotator(1, noise=1e6).rank(PROMPT, texts, ends)
    assert ranks != SimulatedAnnotator(2, noise=1e6).rank(PROMPT, texts, ends)
    assert ranks != SimulatedAnnotator(1, noise=1e6).rank(CHINESE, texts, ends)


def test_another_preference_is_obeyed() -> None:
    cold = SimulatedAnnotator(0, noise=0, preference=Preference(friendly=0.0, longest_words=15.0))
    assert cold.rank(PROMPT, [FRIENDLY + " Please do.", NEUTRAL], [True, True]) == (1, 0)


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="2 answers but 1 marks"):
        SimulatedAnnotator(0).rank(PROMPT, ["a", "b"], [True])
    with pytest.raises(ConfigError, match="noise"):
        SimulatedAnnotator(0, noise=-1.0)


def test_it_says_that_it_is_simulated_and_needs_no_torch() -> None:
    assert SimulatedAnnotator.name == "simulated: brief-friendly"
    code = "import sys, dressage.feedback.annotator, dressage.material; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
