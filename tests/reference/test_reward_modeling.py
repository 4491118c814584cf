"""Ranking losses: known values, extremes, pairs and their weights by hand, and what is learnt from labels."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb, exp, log
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.algorithms.aggregate import aggregate_pairs, rankings_total
from dressage.algorithms.reward_modeling import (
    RankingSettings,
    RegressionSettings,
    affine_normalisation,
    best_answers,
    imitation_loss,
    learnt_from,
    log_exp,
    log_sig,
    ranking_loss,
    ranking_pairs,
    ranking_statistics,
    regression_loss,
    within_margin,
)
from dressage.batches import PreferenceBatch, TokenScores
from dressage.errors import ConfigError


def rankings(group: Tensor, rank: Tensor) -> PreferenceBatch:
    """Rankings whose texts do not matter."""
    text = torch.zeros(len(group), 1, dtype=torch.int64)
    return PreferenceBatch(text, text == 0, text == 0, torch.zeros_like(group), group, rank)


@pytest.mark.parametrize("loss", [log_sig, log_exp])
def test_ln_2_at_initialisation(loss: object) -> None:
    assert callable(loss)
    assert loss(tensor(0.3), tensor(0.3)).item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("loss", [log_sig, log_exp])
@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "expected"),
    [
        (2.0, -1.0, 0.0, log(1 + exp(-3))),
        (-1.0, 2.0, 0.0, log(1 + exp(3))),
        (1.0, 0.0, 1.0, log(2)),  # won by the margin exactly
        (0.0, 1e4, 0.0, 1e4),  # exp(1e4) is more than any float
        (1e4, 0.0, 0.0, 0.0),
        (-1e30, 1e30, 0.0, 2e30),
    ],
)
def test_pair_loss_by_hand(loss: object, chosen: float, rejected: float, margin: float, expected: float) -> None:
    assert callable(loss)
    chosen_score = tensor(chosen, requires_grad=True)
    value = loss(chosen_score, tensor(rejected), margin)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert chosen_score.grad is not None and -1 <= chosen_score.grad.item() <= 0


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_log_sig_and_log_exp_are_one_number(chosen: float, rejected: float) -> None:
    pair = tensor(chosen), tensor(rejected)
    assert_close(log_sig(*pair), log_exp(*pair), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [log_sig, log_exp])
def test_scores_in_bf16_are_compared_in_fp32(loss: object) -> None:
    """In bf16 a margin of 0.001 beside a score of 3 would be lost."""
    assert callable(loss)
    scores = tensor(3.0, dtype=torch.bfloat16), tensor(3.0, dtype=torch.bfloat16)
    value = loss(*scores, 0.001)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(log(1 + exp(0.001)), abs=1e-7)


def test_pairs_by_hand() -> None:
    """Prompt 4 ranks rows 0 > 3 > 1, prompt 9 ranks 5 > 2 = 4; rows of the prompts are mixed."""
    group, rank = tensor([4, 4, 9, 4, 9, 9]), tensor([0, 2, 1, 1, 1, 0])
    better, worse = ranking_pairs(group, rank)
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == {(0, 1), (0, 3), (3, 1), (5, 2), (5, 4)}


@pytest.mark.parametrize("answers", [2, 4, 9])
def test_k_answers_make_k_choose_2_pairs(answers: int) -> None:
    rank = torch.randperm(answers)
    better, worse = ranking_pairs(torch.zeros(answers, dtype=torch.int64), rank)
    expected = {(i, j) if rank[i] < rank[j] else (j, i) for i, j in combinations(range(answers), 2)}
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == expected
    assert len(better) == comb(answers, 2)


def test_a_prompt_counts_once_however_many_answers_it_has() -> None:
    """Pairs: three of prompt 4, two of prompt 9 (one tie), none of prompt 5 (all tied)."""
    group, rank = tensor([4, 4, 9, 4, 9, 9, 5, 5]), tensor([0, 2, 1, 1, 1, 0, 0, 0])
    rewards = tensor([0.1, -0.4, 0.7, 0.2, 0.0, 0.3, 1.0, 2.0])
    terms = ranking_loss(rewards, rankings(group, rank), RankingSettings())
    prompt = group[ranking_pairs(group, rank)[0]]
    totals = rankings_total([prompt])
    assert (totals.sequences, totals.tokens) == (2, 5)

    def nll(i: int, j: int) -> float:
        return log(1 + exp(rewards[j].item() - rewards[i].item()))

    by_hand = ((nll(0, 1) + nll(0, 3) + nll(3, 1)) / 3 + (nll(5, 2) + nll(5, 4)) / 2) / 2
    assert aggregate_pairs(terms["pair"], prompt, totals).item() == pytest.approx(by_hand, abs=1e-6)


@given(st.integers(0, 1000), st.integers(1, 3))
def test_cutting_between_prompts_changes_nothing(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    rank, rewards = torch.randint(0, 4, (12,), generator=generator), torch.randn(12, generator=generator)
    prompts = group[ranking_pairs(group, rank)[0]]

    def share(rows: Tensor) -> Tensor:
        piece = rankings(group[rows], rank[rows])
        prompt = piece.group[ranking_pairs(piece.group, piece.rank)[0]]
        return aggregate_pairs(
            ranking_loss(rewards[rows], piece, RankingSettings())["pair"], prompt, rankings_total([prompts])
        )

    assert_close(share(group < cut) + share(group >= cut), share(group >= 0))


def test_rankings_without_a_pair_are_0() -> None:
    group, rank = tensor([0, 0]), tensor([1, 1])
    rewards = tensor([0.5, 1.0], requires_grad=True)
    pairs = ranking_loss(rewards, rankings(group, rank), RankingSettings())["pair"]
    prompt = group[ranking_pairs(group, rank)[0]]
    loss = aggregate_pairs(pairs, prompt, rankings_total([prompt]))
    loss.backward()
    assert loss.item() == 0.0
    assert rewards.grad is not None and (rewards.grad == 0).all()


def test_the_margin_is_asked_of_the_better_answer() -> None:
    batch = rankings(tensor([0, 0]), tensor([1, 0]))
    terms = ranking_loss(tensor([0.0, 1.5]), batch, RankingSettings(margin=1.5))
    assert terms["pair"].item() == pytest.approx(log(2), abs=1e-6)
    prompt = tensor([0])  # one prompt of one pair: its mean is that pair's
    assert aggregate_pairs(terms["pair"], prompt, rankings_total([prompt])).item() == pytest.approx(log(2), abs=1e-6)


def test_a_margin_is_as_wide_as_the_answers_grades_are_apart() -> None:
    """Grades 5, 4.5 and 2 of one prompt, none of the other, where the margin is plain; all win by it exactly."""
    group, rank = tensor([0, 0, 0, 1, 1]), tensor([0, 1, 2, 1, 0])
    grade = tensor([5.0, 4.5, 2.0, float("nan"), float("nan")])
    batch = replace(rankings(group, rank), grade=grade)
    settings = RankingSettings(margin=0.4)
    rewards = tensor([2.0, 1.8, 0.8, 0.1, 0.5])
    assert_close(ranking_loss(rewards, batch, settings)["pair"], torch.full((4,), log(2)))
    plain = ranking_loss(rewards, batch, RankingSettings())["pair"]
    assert_close(plain, log_sig(*(rewards[rows] for rows in ranking_pairs(group, rank))))


def test_ties_by_hand() -> None:
    """Ranked 0 = 1 > 2 and 3 = 4: two ordered pairs, two ties; the tie of the second prompt is all it teaches."""
    batch = rankings(tensor([0, 0, 0, 1, 1]), tensor([0, 0, 1, 2, 2]))
    rewards = tensor([1.0, 0.0, -1.0, 0.5, 0.5])
    half = RankingSettings(ties="half")
    pairs = ranking_loss(rewards, batch, half)["pair"]
    expected = [log(1 + exp(-2)), log(1 + exp(-1)), (log(1 + exp(1)) + log(1 + exp(-1))) / 2, log(2)]
    assert pairs.tolist() == pytest.approx(expected, abs=1e-6)
    assert learnt_from(batch, half).tolist() == [0, 0, 0, 1]
    assert learnt_from(batch, RankingSettings()).tolist() == [0, 0]
    prompt = learnt_from(batch, half)
    mean = aggregate_pairs(pairs, prompt, rankings_total([prompt]))
    assert mean.item() == pytest.approx((sum(expected[:3]) / 3 + expected[3]) / 2, abs=1e-6)


def test_ties_within_the_margin_by_hand() -> None:
    """Margin 1/2, exp(2 x 1/2) - 1 = e - 1: ranked 0 = 1 > 2, scored 1, 0 and -1."""
    batch = rankings(tensor([0, 0, 0]), tensor([0, 0, 1]))
    settings = RankingSettings(ties="rao_kupper", margin=0.5)
    pairs = ranking_loss(tensor([1.0, 0.0, -1.0]), batch, settings)["pair"]
    tie = (exp(1) - 1) / (1 + exp(-0.5)) / (1 + exp(1.5))
    assert pairs.tolist() == pytest.approx([log(1 + exp(-1.5)), log(1 + exp(-0.5)), -log(tie)], abs=1e-6)


@given(st.floats(-20, 20), st.floats(0.01, 5))
def test_winning_losing_and_a_tie_are_all_that_can_be(difference: float, margin: float) -> None:
    """Rao and Kupper's three probabilities add up to 1, and a tie is likeliest at equal scores."""
    one, other = tensor(difference, dtype=torch.double), tensor(0.0, dtype=torch.double)
    parts = log_sig(one, other, margin), log_sig(other, one, margin), within_margin(one, other, margin)
    assert sum((-part).exp().item() for part in parts) == pytest.approx(1, abs=1e-9)
    assert within_margin(one, other, margin) >= within_margin(other, other, margin) - 1e-12


@pytest.mark.parametrize("changes", [{"ties": "no"}, {"ties": "rao_kupper"}, {"margin": -1.0}, {"lm_coef": -0.1}])
def test_settings_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="settings"):
        RankingSettings(**changes)


def test_the_best_answers_are_those_that_won_and_never_lost() -> None:
    """Ranked 0 = 1 > 2 and 4 > 3; the answers of the third prompt are tied, which says nothing of their worth."""
    group, rank = tensor([7, 7, 7, 2, 2, 5, 5]), tensor([0, 0, 1, 4, 1, 0, 0])
    rows = torch.arange(7)[:, None]
    batch = replace(rankings(group, rank), tokens=rows, attention_mask=rows < 3, response_mask=rows != 1)
    best = best_answers(batch)
    assert best.tokens.tolist() == [[0], [1], [4]]
    assert best.attention_mask.tolist() == [[True], [True], [False]]
    assert best.loss_mask.tolist() == [[True], [False], [True]]
    terms = imitation_loss(TokenScores(tensor([[-1.0], [-2.0], [0.0]])), best, RankingSettings(lm_coef=0.5))
    assert {name: term.tolist() for name, term in terms.items()} == {"imitation": [[0.5], [1.0], [0.0]]}


def test_grades_are_learnt_by_their_squared_error() -> None:
    batch = replace(rankings(tensor([0, 0]), tensor([0, 0])), grade=tensor([0.5, -1.0]))
    terms = regression_loss(tensor([1.0, 2.0], dtype=torch.bfloat16), batch, RegressionSettings())
    assert_close(terms, {"squared_error": tensor([0.25, 9.0])})
    assert learnt_from(batch, RegressionSettings()).tolist() == [0, 0]
    with pytest.raises(AssertionError):
        regression_loss(tensor([1.0, 2.0]), replace(batch, grade=None), RegressionSettings())


def test_accuracy_by_hand() -> None:
    """Ranked 0 > 1 > 2; scored 1 = 0 > 2: two pairs right, one undecided."""
    watched = ranking_statistics(tensor([0.5, 0.5, -1.0]), rankings(tensor([0, 0, 0]), tensor([0, 1, 2])))
    assert sorted(watched["accuracy"].tolist()) == [0.5, 1.0, 1.0]
    assert sorted(watched["margin"].tolist()) == [0.0, 1.5, 1.5]


def test_differences_of_reward_are_recovered_from_bradley_terry_labels() -> None:
    """Labels in the shares sigmoid(r_i - r_j) of four answers: their best scores differ as r does."""
    truth, times = [0.0, 1.0, 2.0, 3.0], 2000
    winners, losers = [], []
    for i, j in combinations(range(4), 2):
        wins = round(times / (1 + exp(truth[j] - truth[i])))
        winners += [i] * wins + [j] * (times - wins)
        losers += [j] * wins + [i] * (times - wins)
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    answers = torch.stack([tensor(losers), tensor(winners)], -1).flatten()
    group = torch.arange(len(winners)).repeat_interleave(2)
    rank = tensor([1, 0]).repeat(len(winners))
    # All comparisons at once would make an N x N table of pairs; they come in parts, as in training.
    parts = torch.arange(len(group)).split(240)
    optimizer = torch.optim.LBFGS([scores], line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        shares = []
        for rows in parts:
            batch = rankings(group[rows], rank[rows])
            prompt = batch.group[ranking_pairs(batch.group, batch.rank)[0]]
            pairs = ranking_loss(scores[answers[rows]], batch, RankingSettings())["pair"]
            shares.append(aggregate_pairs(pairs, prompt, rankings_total([group[::2]])))
        loss = torch.stack(shares).sum()
        loss.backward()
        return loss

    assert closure().item() == pytest.approx(log(2), abs=1e-9)
    optimizer.step(closure)
    learnt = (scores - scores[0]).tolist()
    assert learnt == pytest.approx(truth, abs=5e-3)


def test_normalised_scores_have_mean_0_and_deviation_1() -> None:
    """Of 2, 4, 9: mean 5, population variance 26 / 3."""
    gain, bias = affine_normalisation(tensor([2.0, 4.0, 9.0]))
    assert gain.item() == pytest.approx((3 / 26) ** 0.5)
    assert bias.item() == pytest.approx(-5 * (3 / 26) ** 0.5)
    # A hundredth of it: scores are spread as well as drawn in.
    close, _ = affine_normalisation(tensor([0.02, 0.04, 0.09]))
    assert close.item() == pytest.approx(100 * (3 / 26) ** 0.5)


def test_equal_scores_are_only_moved() -> None:
    gain, bias = affine_normalisation(tensor([3.3, 3.3, 3.3]))
    assert gain.item() == pytest.approx(1.0)
    assert bias.item() == pytest.approx(-3.3)
