"""Strengths from comparisons: many judgements of the same answers become one number for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Strengths = Tensor
"""Of every player [K], in nats: i beats j with probability sigmoid(strength_i - strength_j)."""
TOLERANCE, ROUNDS = 1e-10, 10_000
ELO_POINTS = 400 / math.log(10)
"""To a nat: 400 points are odds of ten to one."""


class Game(NamedTuple):
    """Two players who met, and what share of the point went to the first: 1 it won, 1/2 a tie, 0 it lost."""

    first: int
    second: int
    share: float = 1.0


def games_of(ranks: Sequence[int], players: Sequence[int]) -> list[Game]:
    """A ranking of K players (0 is best) as its K (K - 1) / 2 games."""
    return [
        Game(players[i], players[j], 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]))
        for i in range(len(ranks))
        for j in range(i + 1, len(ranks))
    ]


def bradley_terry(games: Iterable[Game], players: int, *, prior: float = 0.0) -> Strengths:
    """The strengths under which the games are likeliest, by minorization-maximization (Hunter 2004, eq. 3).

    With `prior` everybody has also won and lost so many games against a player of strength 0: nobody is then
    infinitely strong for never having lost. Without it the strengths have mean 0; ValueError if there is no maximum,
    because some players never lost to the others.
    """
    wins = torch.zeros(players, players, dtype=torch.double)
    for first, second, share in games:
        wins[first, second] += share
        wins[second, first] += 1 - share
    if prior == 0 and not _connected(wins):
        raise ValueError("some players never lost to the others: their strength has no bound without a prior")
    met, won = wins + wins.T, wins.sum(1) + prior
    power = torch.ones(players, dtype=torch.double)
    for _ in range(ROUNDS):
        expected = (met / (power[:, None] + power[None, :])).sum(1) + 2 * prior / (power + 1)
        new = won / expected
        if prior == 0:
            new = new / new.log().mean().exp()
        moved, power = (new.log() - power.log()).abs().amax(), new
        if moved < TOLERANCE:
            break
    return power.log()


def elo(games: Iterable[Game], players: int, *, k_factor: float = 32.0) -> Strengths:
    """Strengths moved after each game by how much it surprised; later games count more (Elo 1978).

    `k_factor` is in the usual points, 400 of which are odds of ten to one; the strengths begin at 0 and are in nats.
    """
    strength = [0.0] * players
    for first, second, share in games:
        expected = 1 / (1 + math.exp(strength[second] - strength[first]))
        gained = k_factor / ELO_POINTS * (share - expected)
        strength[first] += gained
        strength[second] -= gained
    return torch.tensor(strength, dtype=torch.double)


def _connected(wins: Tensor) -> bool:
    """Has everybody beaten everybody else, at least by way of others?"""
    reached = (wins > 0) | torch.eye(len(wins), dtype=torch.bool)
    for _ in range(len(wins).bit_length()):
        reached = (reached.double() @ reached.double()) > 0
    return bool(reached.all())
