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

from dressage.algorithms.aggregate import aggregate, aggregate_pairs, count, rankings_total
from dressage.algorithms.catalog import Algorithm, algorithm, preference_algorithm
from dressage.algorithms.preference import OnlineDpoSettings
from dressage.algorithms.reward_modeling import ranking_pairs
from dressage.algorithms.selection import (
    SelectionSettings,
    best_of_groups,
    best_of_n_kl,
    expected_best,
    imitated,
    kept_answers,
    ranked,
)
from dressage.batches import Experience, SupervisedBatch, TokenScores
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
    for rows in torch.arange(len(tuples)).split(512):
        answers = tuples[rows].flatten()
        kept = best_of_groups(answers.double(), group[: len(answers)]).view(len(rows), n)
        assert (kept.sum(-1) == 1).all()
        found.index_add_(0, tuples[rows][kept], chances[tuples[rows]].prod(-1))
    return found


@pytest.mark.parametrize("n", [1, 2, 4, 5])
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
        ({"best": 1, "threshold": 1.5}, [1, 2]),  # 4 is above it too, but not the best
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
    # Of many equals too, where a sort need not keep their order.
    assert best_of_groups(torch.zeros(500), torch.zeros(500), 7).nonzero()[:, 0].tolist() == list(range(7))


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
        ({"round_share": 1.5}, "settings.round_share=1.5"),
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
    assert batch.attention_mask.tolist() == [[True] * 3 + [False] * 2] * 4
    assert batch.response_mask.tolist() == [[False, False, True, False, False]] * 4
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
    count = 800
    rollouts = experience([1, 2] * count, [n // 2 for n in range(2 * count)])
    settings = OnlineDpoSettings(label_noise=2.0, all_pairs=all_pairs)
    scores = tensor([0.0, 1.5]).repeat(count)
    first, again, other = (ranked(rollouts, scores, settings, seed=seed).rank for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first[1::2] == 0).float().mean().item() == pytest.approx(1 / (1 + exp(-0.75)), abs=0.03)


# --- whole algorithms on a bandit: a table of logits, one row a prompt, answers of one token


def drawn(logits: Tensor, groups: int, answers: int, generator: torch.Generator) -> Experience:
    """So many groups of answers to every prompt; the reference is uniform."""
    prompts, actions = logits.shape
    prompt = torch.arange(prompts).repeat_interleave(groups * answers)
    chosen = torch.multinomial(logits.detach().softmax(-1)[prompt], 1, generator=generator)
    tokens, mask = torch.cat([prompt[:, None], chosen], 1), tensor([[False, True]]).expand(len(prompt), 2)
    said = torch.full(tokens.shape, 1 / actions, dtype=torch.float64).log() * mask
    group = torch.arange(prompts * groups).repeat_interleave(answers)
    return Experience(tokens, torch.ones_like(mask), mask, said, said, said * 0, group, ref_logprobs=said)


def loss_of(row: Algorithm, logits: Tensor, batch: Any) -> Tensor:
    logprobs = logits.log_softmax(-1)[batch.tokens[:, 0], batch.tokens[:, 1]]
    if isinstance(batch, SupervisedBatch):
        scores = TokenScores(torch.stack([torch.zeros_like(logprobs), logprobs], -1))
        nll = row.losses[SupervisedBatch](scores, batch, row.settings)["nll"]
        return aggregate(nll, batch.loss_mask, count([batch.loss_mask]))
    assert row.implicit_reward is not None
    pair = row.losses[type(batch)](row.implicit_reward(logprobs, batch, row.settings), batch, row.settings)["pair"]
    prompt = batch.group[ranking_pairs(batch.group, batch.rank)[0]]
    return aggregate_pairs(pair, prompt, rankings_total([prompt]))


def taught(row: Algorithm, experience: Experience, seed: int, score: Any = None) -> Any:
    """What a row makes of answers; without a score an answer's number is its worth."""
    prompt, chosen = experience.tokens.unbind(-1)
    worth = chosen.float() if score is None else score(prompt, chosen)
    assert row.teach is not None
    return row.teach(experience, worth, row.settings, seed)


def converged(row: Algorithm, batches: list[Any], logits: Tensor) -> Tensor:
    """Logits that learnt these batches to the end."""
    leaf = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([leaf], line_search_fn="strong_wolfe", max_iter=60, tolerance_grad=1e-8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([loss_of(row, leaf, batch) for batch in batches]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return leaf.detach()


def best_of_n(chances: Tensor, n: int) -> Tensor:
    below = torch.cat([torch.zeros(1, dtype=torch.float64), chances.cumsum(0)])
    return (below**n).diff()


@pytest.mark.parametrize("name", ["rejection_sampling", "expert_iteration"])
def test_imitating_the_best_of_n_gives_the_best_of_n(name: str) -> None:
    """Learnt to the end, rejection sampling composes: best of n of best of n is best of n squared. Expert iteration
    is the mean of the best of n of every policy so far."""
    row, generator, n = algorithm(name), torch.Generator().manual_seed(1), 3
    logits, found, expected, kept, sampled = REFERENCE.log()[None], [], [], [], REFERENCE
    for step in range(3):
        batches = [taught(row, drawn(logits, 600, n, generator), seed=step) for _ in range(6)]
        kept = [*kept, *batches] if row.afresh else batches
        logits = converged(row, kept, REFERENCE.log()[None] if row.afresh else logits)
        best = best_of_n(sampled, n)
        expected.append(best)
        sampled = torch.stack(expected).mean(0) if row.afresh else best
        found.append(logits.softmax(-1)[0])
        assert found[-1].tolist() == pytest.approx(sampled.tolist(), abs=2e-2)
    if not row.afresh:
        assert_close(sampled, best_of_n(REFERENCE, n**3))
    reward = [(one * torch.arange(4)).sum().item() for one in (REFERENCE, *found)]
    assert reward == sorted(reward) and reward[-1] > reward[0] + 1


OPTIMA = {
    0.5: [0.002144, 0.015842, 0.117059, 0.864955],
    1.0: [0.032059, 0.087144, 0.236883, 0.643914],
    2.0: [0.101536, 0.167405, 0.276004, 0.455054],
}


def online(row: Algorithm, answers: int, rounds: int = 120) -> Tensor:
    """The policy found on the bandit with rewards 0 to 3; the rate falls to 0, the last quarter is averaged."""
    logits, generator = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True), torch.Generator().manual_seed(1)
    optimizer, mean = torch.optim.Adam([logits], lr=0.1), torch.zeros(4, dtype=torch.float64)
    for step in range(rounds):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / rounds)
        optimizer.zero_grad()
        loss_of(row, logits, taught(row, drawn(logits, 800 // answers, answers, generator), seed=step)).backward()
        optimizer.step()
        if step >= rounds - rounds // 4:
            mean += logits.detach()[0] / (rounds // 4)
    return mean.softmax(-1)


@pytest.mark.parametrize(
    ("beta", "answers", "settings"),
    [(0.5, 2, {}), (2.0, 2, {}), (1.0, 4, {"all_pairs": True})],
)
def test_online_dpo_finds_the_optimum_where_labels_are_bradley_and_terrys(
    beta: float, answers: int, settings: dict[str, Any]
) -> None:
    """pi_ref exp(r / beta): what PPO finds with this price on KL, and DPO from labels on all pairs."""
    row = algorithm("online_dpo").with_settings({"beta": beta, "label_noise": 1.0} | settings)
    assert online(row, answers).tolist() == pytest.approx(OPTIMA[beta], abs=1.5e-2)


def test_online_dpo_runs_away_where_the_higher_score_always_wins() -> None:
    """No margin is wide enough then, and beta only slows it: the best gets more than its 0.46 at beta = 2."""
    row = algorithm("online_dpo").with_settings({"beta": 2.0})
    early, late = online(row, 2, rounds=40)[3], online(row, 2, rounds=120)[3]
    assert OPTIMA[2.0][3] + 0.1 < early < late - 0.02


@pytest.mark.parametrize("name", ["rejection_sampling", "expert_iteration", "online_dpo"])
def test_probe_the_better_action_depends_on_the_prompt(name: str) -> None:
    """Two prompts, two actions, one right for each; and a constant score teaches nothing."""
    row, generator = algorithm(name), torch.Generator().manual_seed(1)
    logits = torch.zeros(2, 2, dtype=torch.float64)
    for step in range(3):
        batch = taught(row, drawn(logits, 100, 2, generator), step, lambda prompt, chosen: (prompt == chosen).float())
        logits = converged(row, [batch], logits)
    assert logits.softmax(-1).diagonal().min() > 0.9
    alike = taught(row, drawn(torch.zeros(2, 2), 500, 2, generator), 0, lambda prompt, chosen: 0.0 * chosen)
    if name == "online_dpo":
        assert len(alike.tokens) == 0
    else:
        assert alike.tokens[:, 1].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_online_dpo_is_no_row_for_rankings_of_people() -> None:
    with pytest.raises(ConfigError, match="'online_dpo': does not learn from preferences; those that do: dpo, cdpo"):
        preference_algorithm("online_dpo")
