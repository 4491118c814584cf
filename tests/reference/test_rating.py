"""Strengths from comparisons: closed forms, known strengths recovered, and the optimum another method finds."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dressage.algorithms.rating import ELO_POINTS, Game, bradley_terry, elo, games_of


def by_gradient(games: list[Game], players: int, prior: float = 0.0) -> torch.Tensor:
    """The same maximum as a logistic regression, by L-BFGS."""
    strength = torch.zeros(players, dtype=torch.double, requires_grad=True)
    one, other, share = (torch.tensor(column) for column in zip(*games, strict=True))
    optimizer = torch.optim.LBFGS(
        [strength], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        difference = strength[one] - strength[other]
        won = torch.nn.functional.logsigmoid(difference) * share
        lost = torch.nn.functional.logsigmoid(-difference) * (1 - share)
        against = torch.nn.functional.logsigmoid(strength) + torch.nn.functional.logsigmoid(-strength)
        total = -(won + lost).sum() - prior * against.sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = strength.detach()
    return found - found.mean() if prior == 0 else found


@pytest.mark.parametrize(("won", "tied", "lost"), [(3, 0, 1), (1, 2, 1), (5, 1, 2), (1, 0, 1)])
def test_two_players_differ_by_the_log_odds_of_their_shares(won: int, tied: int, lost: int) -> None:
    """A tie is half a win for each; who is named first does not matter."""
    games = [Game(0, 1)] * won + [Game(1, 0, 0.5)] * tied + [Game(1, 0)] * lost
    one, other = bradley_terry(games, 2).tolist()
    assert one - other == pytest.approx(math.log((won + tied / 2) / (lost + tied / 2)), abs=1e-8)
    assert one + other == pytest.approx(0, abs=1e-9)


def test_one_win_and_the_prior_in_closed_form() -> None:
    """By symmetry s and -s: 1 - sigmoid(2 s) = 2 p (sigmoid(s) - 1/2)."""
    one, other = bradley_terry([Game(0, 1)], 2, prior=0.5).tolist()
    assert one == pytest.approx(-other, abs=1e-8)
    assert 1 - 1 / (1 + math.exp(-2 * one)) == pytest.approx(1 / (1 + math.exp(-one)) - 0.5, abs=1e-8)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 2.0]))
def test_it_is_the_optimum_of_logistic_regression(seed: int, prior: float) -> None:
    chance = random.Random(seed)
    games = [Game(*chance.sample(range(5), 2), chance.choice([0.0, 0.5, 1.0])) for _ in range(20)]
    # A round trip of wins, so that there is an optimum without a prior.
    games += [Game(i, (i + 1) % 5) for i in range(5)]
    assert_close(bradley_terry(games, 5, prior=prior), by_gradient(games, 5, prior), rtol=0, atol=1e-5)


def test_known_strengths_are_recovered() -> None:
    truth = torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5], dtype=torch.double)
    games = [
        Game(i, j, float(share))
        for i, j in combinations(range(5), 2)
        for share in [torch.sigmoid(truth[i] - truth[j])] * 10
    ]
    assert_close(bradley_terry(games, 5), truth, rtol=0, atol=1e-7)


def test_whoever_never_lost_needs_a_prior() -> None:
    games = [Game(0, 1), Game(1, 2), Game(2, 1)]
    with pytest.raises(ValueError, match="prior"):
        bradley_terry(games, 3)
    strength = bradley_terry(games, 3, prior=0.5)
    assert strength[0] > strength[1] and strength[2] == pytest.approx(strength[1].item(), abs=0.5)


def test_elo_by_hand() -> None:
    """Equals: the winner takes half of K. Then the favourite gains less by winning than by its rival's loss."""
    after_one = elo([Game(0, 1)], 2, k_factor=32) * ELO_POINTS
    assert after_one.tolist() == pytest.approx([16, -16]) and after_one.dtype == torch.double
    assert_close(elo([Game(0, 1)], 2) * ELO_POINTS, after_one)  # 32 is the usual K
    expected = 1 / (1 + 10 ** (-32 / 400))
    twice = elo([Game(0, 1), Game(0, 1)], 2, k_factor=32) * ELO_POINTS
    assert twice.tolist() == pytest.approx([16 + 32 * (1 - expected), -16 - 32 * (1 - expected)])
    tie = elo([Game(0, 1), Game(1, 0, 0.5)], 2, k_factor=32) * ELO_POINTS
    assert tie[0].item() == pytest.approx(16 - 32 * (expected - 0.5))


def test_elo_depends_on_the_order_and_bradley_terry_does_not() -> None:
    games = [Game(0, 1), Game(1, 2), Game(2, 0), Game(0, 1)]
    assert not torch.allclose(elo(games, 3), elo(games[::-1], 3))
    assert_close(bradley_terry(games, 3), bradley_terry(games[::-1], 3))


def test_elo_comes_to_the_strengths_that_made_the_games() -> None:
    chance, truth = random.Random(0), [-1.0, 0.0, 1.0]
    games = []
    for _ in range(6000):
        i, j = chance.sample(range(3), 2)
        games.append(Game(i, j, float(chance.random() < 1 / (1 + math.exp(truth[j] - truth[i])))))
    assert elo(games, 3, k_factor=4).tolist() == pytest.approx(truth, abs=0.15)


def test_a_ranking_is_all_its_games() -> None:
    assert games_of([1, 0, 1], [7, 8, 9]) == [Game(7, 8, 0.0), Game(7, 9, 0.5), Game(8, 9, 1.0)]
