"""Many judgements of the same answers -> one ranking of each prompt, with grades."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, pstdev
from typing import Literal

from dressage.algorithms.rating import Game, Strengths, bradley_terry, elo, games_of
from dressage.data.prepare import EncodedRanking
from dressage.data.values import dense_ranks
from dressage.errors import DataError
from dressage.schema import Prompt, Ranking

Merge = Literal["bradley_terry", "elo"]
PRIOR = 0.5
"""Wins and losses that every answer has beside its own, so that one which never lost is not infinitely good."""
_RATE: Mapping[Merge, Callable[[Sequence[Game], int], Strengths]] = {
    "bradley_terry": partial(bradley_terry, prior=PRIOR),
    "elo": elo,
}


def merged(rankings: Sequence[Ranking], by: Merge) -> tuple[Ranking, ...]:
    """One ranking of all the answers to each prompt, in the order of the first; its grades are strengths in nats.

    Every two answers of a ranking are a game, in the order in which rankings and answers stand.
    """
    of_prompt: dict[Prompt, list[Ranking]] = {}
    for ranking in rankings:
        of_prompt.setdefault(ranking.prompt, []).append(ranking)
    return tuple(_one(prompt, judged, by) for prompt, judged in of_prompt.items())


def _one(prompt: Prompt, judged: Sequence[Ranking], by: Merge) -> Ranking:
    players: dict[tuple[str, bool], int] = {}
    games: list[Game] = []
    for ranking in judged:
        finished = ranking.finished or (True,) * len(ranking.answers)
        seats = [players.setdefault(one, len(players)) for one in zip(ranking.answers, finished, strict=True)]
        games += games_of(ranking.ranks, seats)
    # Rounded, so that answers which fared alike are a tie.
    grades = tuple(round(strength, 6) for strength in _RATE[by](games, len(players)).tolist())
    answers, finished = zip(*players, strict=True)
    return Ranking(prompt, answers, dense_ranks([-grade for grade in grades]), finished, grades)


def standardised(
    train: Sequence[EncodedRanking], heldout: Sequence[EncodedRanking]
) -> tuple[list[EncodedRanking], list[EncodedRanking]]:
    """Both with grades that have mean 0 and deviation 1 over the answers in `train`.

    Raises: DataError if a ranking has no grades, or all are equal.
    """
    bare = sum(not row.grades for row in (*train, *heldout))
    if bare:
        raise DataError(
            f"loss=regression: {bare} rankings have no grades; give them grades, or set data.merge=bradley_terry"
        )
    grades = [grade for row in train for grade in row.grades]
    mean, deviation = fmean(grades), pstdev(grades)
    if deviation == 0:
        raise DataError("loss=regression: all answers have the same grade: there is nothing to learn")

    def scaled(row: EncodedRanking) -> EncodedRanking:
        return replace(row, grades=tuple((grade - mean) / deviation for grade in row.grades))

    return [scaled(row) for row in train], [scaled(row) for row in heldout]
