"""Win rates, accuracies, baselines and diversity against what is known from elsewhere."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dressage.errors import DataError
from dressage.evaluation.win_rate import (
    Ranked,
    accuracy_interval,
    length_baseline,
    ordered_pairs,
    pairwise_accuracy,
    win_rate,
)
from dressage.monitor.diversity import distinct, repetition, words


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3 (Wilson)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(correct: int, n: int, low: float, high: float) -> None:
    assert accuracy_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wins_ties_and_losses_are_counted_by_prompt() -> None:
    result = win_rate([1.0, 2.0, 3.0, 0.5], [0.0, 2.0, 4.0, 0.4])
    assert (result.wins, result.ties, result.losses, result.n, result.rate) == (2, 1, 1, 4, 0.625)


@given(st.integers(0, 60), st.integers(0, 60))
def test_without_ties_it_is_wilson(wins: int, losses: int) -> None:
    n = wins + losses
    if n:
        result = win_rate([1.0] * wins + [0.0] * losses, [0.5] * n)
        assert (result.low, result.high) == pytest.approx(accuracy_interval(wins, n), abs=1e-12)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_bounds_hold_the_rate_and_mirror_when_the_models_change_places(wins: int, ties: int, losses: int) -> None:
    if wins + ties + losses == 0:
        return
    a, b = [1.0] * wins + [0.0] * ties + [-1.0] * losses, [0.0] * (wins + ties + losses)
    one, other = win_rate(a, b), win_rate(b, a)
    assert 0 <= one.low <= one.rate <= one.high <= 1
    assert (one.low, one.rate, one.high) == pytest.approx((1 - other.high, 1 - other.rate, 1 - other.low))
    assert one.high - one.low > 0.01, "never certain after so few prompts"


def test_bounds_solve_the_score_equation() -> None:
    """At each bound the rate lies z standard errors away, the error taken at the bound."""
    result = win_rate([1.0] * 50 + [0.0] * 30 + [-1.0] * 20, [0.0] * 100)
    z = 1.959963985
    tied = 0.3 / (1 + z * z / 100)
    for bound in (result.low, result.high):
        assert abs(result.rate - bound) == pytest.approx(
            z * math.sqrt((bound * (1 - bound) - tied / 4) / 100), rel=1e-6
        )


@pytest.mark.parametrize(
    ("win", "tie", "n"), [(0.5, 0.0, 60), (0.4, 0.3, 60), (0.7, 0.1, 40), (0.2, 0.7, 80), (0.85, 0.1, 100)]
)
def test_the_interval_covers_the_truth_as_often_as_it_says(win: float, tie: float, n: int) -> None:
    """3000 experiments: 95 % of intervals hold the true rate, give or take what the discreteness of n costs."""
    draw, truth, covered, rounds = random.Random(5), win + tie / 2, 0, 3000
    outcomes = draw.choices([1.0, 0.0, -1.0], [win, tie, 1 - win - tie], k=rounds * n)
    for k in range(rounds):
        result = win_rate(outcomes[k * n : (k + 1) * n], [0.0] * n)
        covered += result.low <= truth <= result.high
    assert 0.93 <= covered / rounds <= 0.975


def test_what_cannot_be_compared_is_an_error() -> None:
    for a, b, reason in (([1.0], [], "same prompts"), ([], [], "no prompts"), ([math.nan], [0.0], "at prompt 0")):
        with pytest.raises(DataError, match=reason):
            win_rate(a, b)
    with pytest.raises(DataError):
        accuracy_interval(3, 2)


def test_pairs_by_hand() -> None:
    # Prompt 7: ranks 0 1 1, so two pairs count; scores 3 2 3 order one and tie the other. Prompt 8: one pair, wrong.
    ranked = Ranked(scores=[3.0, 2.0, 3.0, 1.0, 5.0], ranks=[0, 1, 1, 0, 1], groups=[7, 7, 7, 8, 8])
    assert ordered_pairs(*ranked) == (1.5, 3)
    assert pairwise_accuracy(*ranked) == 0.5
    with pytest.raises(DataError, match="different ranks"):
        pairwise_accuracy([1.0, 2.0], [0, 0], [1, 1])


def test_length_baseline_takes_its_side_from_the_training_part_alone() -> None:
    shorter_wins = Ranked([5, 9, 4, 8], [0, 1, 0, 1], [0, 0, 1, 1])
    heldout = Ranked([3, 7, 2, 6, 9, 1], [0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2])
    baseline = length_baseline(shorter_wins, heldout)
    assert not baseline.longer_is_better
    assert baseline.accuracy == pytest.approx(2 / 3)
    longer_wins = Ranked([9, 5], [0, 1], [0, 0])
    assert length_baseline(longer_wins, heldout) == (pytest.approx(1 / 3), True)


def test_words_of_both_languages() -> None:
    assert words("Don't stop — it’s 3 o'clock!") == ["don't", "stop", "it’s", "3", "o'clock"]
    assert words("我爱Python编程。") == ["我", "爱", "python", "编", "程"]


def test_distinct_by_hand() -> None:
    assert distinct(["a b c", "a b d"]) == 3 / 4  # ab bc | ab bd
    assert distinct(["a b c", "a b d"], n=1) == 4 / 6
    assert distinct(["今天好", "今天坏"]) == 3 / 4
    assert distinct(["same words here"] * 10) == 2 / 20
    assert distinct(["one", ""]) == 0.0, "no pair at all"


def test_repetition_by_hand() -> None:
    assert repetition("a b c d e f g") == 0.0
    assert repetition("go go go go go go go") == 0.75  # four runs of four, all the same
    assert repetition("short") == 0.0
