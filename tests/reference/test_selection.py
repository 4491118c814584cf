"""Choosing among answers: by hand, against every subset there is, and on a bandit whose distributions are known."""

from __future__ import annotations

from itertools import combinations, product
from math import exp
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.algorithms.preference import OnlineDpoSettings
from dressage.algorithms.selection import (
    SelectionSettings,
    best_of_groups,
    best_of_n_kl,
    expected_best,
    imitated,
    kept_answers,
    ranked,
)
from dressage.batches import Experience
from dressage.errors import ConfigError

REFERENCE = tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
"""Four answers, the rarer the better."""


# --- best of n --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, 0.1931), (4, 0.6363), (8, 1.2044), (16, 1.8351), (64, 3.1745)])
def test_the_kl_of_the_best_of_n(n: int, nats: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(nats, abs=5e-5)


def best_of(n: int, chances: Tensor) -> Tensor:
    """The distribution of the best of n answers, all n-tuples one by one."""
    found = torch.zeros_like(chances)
    tuples = tensor(list(product(range(len(chances)), repeat=n)))
    group = torch.arange(len(tuples)).repeat_interleave(n)
    for rows in torch.arange(len(tuples)).split(64):
        answers = tuples[rows].flatten()
        kept = best_of_groups(answers.double(), group[: len(answers)]).view(len(rows), n)
        assert (kept.sum(-1) == 1).all()
        found.index_add_(0, tuples[rows][kept], chances[tuples[rows]].prod(-1))
    return found


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_the_best_of_n_has_the_distribution_it_should(n: int) -> None:
    """F(a)^n - F(a-)^n; best of 1 is sampling; and its KL keeps below the bound."""
    found, below = best_of(n, REFERENCE), torch.cat([tensor([0.0]).double(), REFERENCE.cumsum(0)])
    assert_close(found, below[1:] ** n - below[:-1] ** n)
    kl = (found * (found / REFERENCE).log()).sum().item()
    assert kl == pytest.approx(0.0, abs=1e-12) if n == 1 else 0.3 * best_of_n_kl(n) < kl < best_of_n_kl(n)


def test_with_many_rare_answers_the_bound_is_the_kl() -> None:
    at = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for n in (2, 8, 64):
        chances = (at**n).diff()
        assert (chances * (chances * 20_000).log()).nansum().item() == pytest.approx(best_of_n_kl(n), abs=1e-3)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=7), st.integers(1, 7))
def test_the_expected_best_is_the_mean_over_all_subsets(scores: list[int], k: int) -> None:
    k = min(k, len(scores))
    best = [max(subset) for subset in combinations(scores, k)]
    assert expected_best(tensor(scores).double(), k).item() == pytest.approx(sum(best) / len(best))


def test_the_expected_best_of_several_prompts_at_once() -> None:
    """Of 3 the best of 2: (b + c + c) / 3 for a < b < c."""
    scores = tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 6.0]])
    assert_close(expected_best(scores, 2), tensor([8 / 3, 4.0]))
    assert_close(expected_best(scores, 1), scores.mean(-1))
    assert_close(expected_best(scores, 3), tensor([3.0, 6.0]))


# --- which answers are kept -------------------------------------------------------------------------------------------

SCORES = tensor([1.0, 3.0, 3.0, -1.0, 2.0, 0.5])
GROUP = tensor([7, 7, 2, 2, 2, 7])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [1, 2]),
        ({"best": 2}, [0, 1, 2, 4]),
        ({"best": None}, [0, 1, 2, 3, 4, 5]),
        ({"best": 9}, [0, 1, 2, 3, 4, 5]),
        ({"best": None, "threshold": 1.0}, [1, 2, 4]),
        ({"best": None, "threshold": 3.0}, []),
        ({"best": None, "round_share": 0.5}, [1, 2, 4]),
        ({"best": None, "round_share": 0.4}, [1, 2, 4]),  # 2.4 answers are 3
        ({"best": 2, "threshold": 1.5, "round_share": 0.3}, [1]),  # of 1, 2 and 4; of the two that tie, the earlier
    ],
)
def test_what_is_kept_by_hand(settings: dict[str, Any], kept: list[int]) -> None:
    """One group is 1, 3, 0.5, the other 3, -1, 2."""
    found = kept_answers(SCORES, GROUP, SelectionSettings(**settings))
    assert found.nonzero()[:, 0].tolist() == kept
    assert len(kept) <= SelectionSettings(**settings).most(2, 3)


def test_the_best_of_one_is_every_answer() -> None:
    assert best_of_groups(SCORES, torch.arange(6)).all()
    assert best_of_groups(torch.zeros(6), GROUP).tolist() == [True, False, True, False, False, False]


def test_at_most_so_many_are_kept() -> None:
    """What a dry run counts with."""
    assert SelectionSettings().most(6, 4) == 6
    assert SelectionSettings(best=None, round_share=0.25).most(6, 4) == 6
    assert SelectionSettings(best=2, round_share=0.07).most(50, 4) == 7
    assert SelectionSettings(best=9).most(6, 4) == 24


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"best": 0}, "settings.best=0"),
        ({"best": 1.5}, "settings.best=1.5"),
        ({"best": True}, "settings.best=True"),
        ({"round_share": 0.0}, "settings.round_share=0.0"),
        ({"round_share": None}, "settings.round_share=None"),
        ({"threshold": float("inf")}, "settings.threshold=inf"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SelectionSettings(**settings)
    assert str(refused.value).startswith(said)


# --- what becomes of them ---------------------------------------------------------------------------------------------


def experience(answers: list[int], group: list[int], lost: tuple[int, ...] = ()) -> Experience:
    """Answers of one token to a prompt of two, padded to five; the reference finds answer a exp(-a / 2) likely."""
    count = len(answers)
    tokens = torch.cat([torch.full((count, 2), 8), tensor(answers)[:, None], torch.zeros(count, 2).long()], 1)
    column = torch.arange(5).expand(count, 5)
    counted = (column == 2) & ~torch.isin(torch.arange(count), tensor(lost, dtype=torch.int64))[:, None]
    said = -0.5 * tokens * (column == 2)
    return Experience(tokens, column < 3, counted, said, said, said * 0, tensor(group), ref_logprobs=said)


def test_what_is_kept_becomes_demonstrations() -> None:
    batch = imitated(experience([5, 1, 4, 2], [0, 0, 1, 1]), tensor([1.0, 2.0, 3.0, 0.0]), SelectionSettings(), seed=1)
    assert batch.tokens[:, 2].tolist() == [1, 4]
    assert batch.attention_mask.tolist() == [[True] * 3 + [False] * 2] * 2
    assert batch.loss_mask.tolist() == [[False, False, True, False, False]] * 2


def test_an_answer_left_out_of_the_loss_is_no_candidate() -> None:
    rollouts, scores = experience([5, 1, 4, 2], [0, 0, 1, 1], lost=(1,)), tensor([1.0, 2.0, 3.0, 0.0])
    assert imitated(rollouts, scores, SelectionSettings(), seed=1).tokens[:, 2].tolist() == [5, 4]
    assert ranked(rollouts, scores, OnlineDpoSettings(), seed=1).tokens[:, 2].tolist() == [4, 2]


def test_the_best_is_ranked_above_the_worst() -> None:
    rollouts = experience([5, 1, 4, 2, 6, 3], [0, 0, 0, 1, 1, 1])
    scores = tensor([1.0, 2.0, 3.0, 0.0, 0.0, -1.0])
    batch = ranked(rollouts, scores, OnlineDpoSettings(), seed=1)
    assert batch.tokens[:, 2].tolist() == [5, 4, 2, 3]
    assert (batch.group.tolist(), batch.rank.tolist()) == ([0, 0, 1, 1], [1, 0, 0, 1])
    assert batch.last.tolist() == [2] * 4
    assert batch.ref_answer_logprobs is not None
    assert batch.ref_answer_logprobs.tolist() == [-2.5, -2.0, -1.0, -1.5]
    everyone = ranked(rollouts, scores, OnlineDpoSettings(all_pairs=True), seed=1)
    assert everyone.rank.tolist() == [2, 1, 0, 0, 0, 2]


def test_answers_that_score_alike_make_no_pair() -> None:
    rollouts, scores = experience([5, 1, 4, 2], [0, 0, 1, 1]), tensor([1.0, 1.0, 3.0, 0.0])
    for settings in (OnlineDpoSettings(), OnlineDpoSettings(all_pairs=True)):
        assert ranked(rollouts, scores, settings, seed=1).tokens[:, 2].tolist() == [4, 2]


@pytest.mark.parametrize("all_pairs", [False, True])
def test_noisy_labels_are_bradley_and_terrys(all_pairs: bool) -> None:
    """Scores 1.5 apart and noise 2: the better wins with probability sigmoid(0.75); another seed, other labels."""
    count = 1500
    rollouts = experience([1, 2] * count, [n // 2 for n in range(2 * count)])
    settings = OnlineDpoSettings(label_noise=2.0, all_pairs=all_pairs)
    scores = tensor([0.0, 1.5]).repeat(count)
    first, again, other = (ranked(rollouts, scores, settings, seed=seed).rank for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first[1::2] == 0).float().mean().item() == pytest.approx(1 / (1 + exp(-0.75)), abs=0.03)
