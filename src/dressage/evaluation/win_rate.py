"""Who wins, how often, and how sure we are. Plain numbers in, plain numbers out; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import NamedTuple

from dressage.errors import DataError


@dataclass(frozen=True)
class WinRate:
    """How often the first of two models was preferred, a tie counting half, with its interval."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int


def win_rate(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> WinRate:
    """How often `a` beats `b`, prompt by prompt: a[i] and b[i] judge the two answers to prompt i.

    The interval inverts the score test, as Wilson (1927) does for wins and losses. With ties the outcome of a prompt is
    1, 1/2 or 0 and its variance at rate p is p(1 - p) - t/4, where t is the share of ties, so the bounds are the roots
    of (rate - p)^2 = z^2/n [p(1 - p) - t/4]. t is shrunk to t / (1 + z^2/n), or a handful of ties would leave no doubt
    at all. Without ties this is Wilson's interval to the last digit; ties make it narrower, as they should.
    """
    if len(a) != len(b):
        raise DataError(f"win rate: {len(a)} scores against {len(b)}; both models must answer the same prompts")
    if not a:
        raise DataError("win rate: no prompts to compare")
    if broken := [i for i, pair in enumerate(zip(a, b, strict=True)) if not all(map(math.isfinite, pair))]:
        raise DataError(f"win rate: {len(broken)} scores are not finite, the first at prompt {broken[0]}")
    wins = sum(x > y for x, y in zip(a, b, strict=True))
    ties = sum(x == y for x, y in zip(a, b, strict=True))
    n = len(a)
    rate = (wins + ties / 2) / n
    return WinRate(rate, *_score_interval(rate, ties / n, n, level), wins, ties, n - wins - ties, n)


def accuracy_interval(correct: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of correct / n (Wilson 1927): for independent trials, so one comparison a prompt."""
    if not 0 <= correct <= n or n < 1:
        raise DataError(f"accuracy: {correct:g} right of {n} is not a share")
    return _score_interval(correct / n, 0.0, n, level)


def _score_interval(rate: float, tied: float, n: int, level: float) -> tuple[float, float]:
    k = NormalDist().inv_cdf((1 + level) / 2) ** 2 / n
    tied = tied / (1 + k)
    middle = rate + k / 2
    # Where every outcome is equal, rounding may leave a hair below zero, or the rate a hair outside.
    half_width = math.sqrt(max(0.0, k * (rate * (1 - rate) - tied / 4) + k * k * (1 - tied) / 4))
    low, high = (middle - half_width) / (1 + k), (middle + half_width) / (1 + k)
    return max(0.0, min(low, rate)), min(1.0, max(high, rate))


class Ranked(NamedTuple):
    """Answers in one flat list: a number for each, the rank it was given (0 is best) and the prompt it belongs to."""

    scores: Sequence[float]
    ranks: Sequence[int]
    groups: Sequence[int]


def ordered_pairs(scores: Sequence[float], ranks: Sequence[int], groups: Sequence[int]) -> tuple[float, int]:
    """Pairs ordered as ranked, equal scores counting half, and all pairs: of one group and not tied in rank."""
    members: dict[int, list[tuple[float, int]]] = {}
    for score, rank, group in zip(scores, ranks, groups, strict=True):
        members.setdefault(group, []).append((score, rank))
    right, pairs = 0.0, 0
    for answers in members.values():
        for (score_a, rank_a), (score_b, rank_b) in combinations(answers, 2):
            if rank_a == rank_b:
                continue
            margin = (score_a - score_b) * (1 if rank_a < rank_b else -1)
            right += 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
            pairs += 1
    return right, pairs


def pairwise_accuracy(scores: Sequence[float], ranks: Sequence[int], groups: Sequence[int]) -> float:
    """Share of the pairs of a group, tied ranks left out, with scores in the order of rank; equal scores count half."""
    right, pairs = ordered_pairs(scores, ranks, groups)
    if pairs == 0:
        raise DataError("pairwise accuracy: no two answers to one prompt with different ranks")
    return right / pairs


class LengthBaseline(NamedTuple):
    """What a judge that sees only length would reach."""

    accuracy: float
    longer_is_better: bool


def length_baseline(train: Ranked, heldout: Ranked) -> LengthBaseline:
    """Held-out accuracy of "the longer is better" or "the shorter is better", whichever is right more often on `train`.

    The `scores` of both are lengths, in any unit. A reward model that does not beat this may have learnt length alone.
    """
    longer_is_better = pairwise_accuracy(*train) >= 0.5
    accuracy = pairwise_accuracy(*heldout)
    return LengthBaseline(accuracy if longer_is_better else 1 - accuracy, longer_is_better)


class Calibration(NamedTuple):
    """How sure a judge of pairs is, beside how often it is right."""

    error: float
    """Mean distance between the two within groups of like sureness (expected calibration error, Guo et al. 2017)."""
    sure: float
    right: float


def calibration_error(margins: Sequence[float], groups: int = 5) -> Calibration:
    """Of pairs by their margins, the log-odds given to the better answer; equal scores are half right.

    A group has as many pairs as the next, the least sure in the first.
    """
    pairs = sorted((1 / (1 + math.exp(-abs(m))), 1.0 if m > 0 else 0.5 if m == 0 else 0.0) for m in margins)
    n, groups = len(pairs), min(groups, len(pairs))
    if n == 0:
        raise DataError("calibration: no pairs")
    cut = [pairs[n * k // groups : n * (k + 1) // groups] for k in range(groups)]
    sums = [[sum(column) for column in zip(*group, strict=True)] for group in cut]
    sure, right = (sum(column) / n for column in zip(*sums, strict=True))
    return Calibration(sum(abs(s - r) for s, r in sums) / n, sure, right)
