"""Learning straight from preferences: known values, gradients and optima by hand, and the policy a bandit ends in."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import exp, log, log1p
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.algorithms.aggregate import aggregate_pairs, rankings_total
from dressage.algorithms.catalog import ALGORITHMS, Algorithm, algorithm, preference_algorithm
from dressage.algorithms.preference import (
    DpoSettings,
    IpoSettings,
    KtoSettings,
    OrpoSettings,
    SimpoSettings,
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_odds_reward,
    rating_statistics,
    summed_over_answers,
)
from dressage.algorithms.reward_modeling import ranking_pairs
from dressage.batches import PreferenceBatch, RatingBatch
from dressage.errors import ConfigError

PAIRED = [
    name
    for name, row in ALGORITHMS.items()
    if row.implicit_reward is not None and PreferenceBatch in row.losses and "reward" not in row.roles
]
BETTER, WORSE = 0, 1


def pairs(lengths: list[int], reference: list[float] | None = None) -> PreferenceBatch:
    """Answers of these lengths, two to a prompt, the better one first."""
    count, width = len(lengths), max(lengths) + 1
    response = torch.arange(width) >= width - tensor(lengths)[:, None]
    text = torch.zeros(count, width, dtype=torch.int64)
    group, rank = torch.arange(count) // 2, torch.arange(count) % 2
    said = None if reference is None else tensor(reference, dtype=torch.float64)
    return PreferenceBatch(text, text == 0, response, torch.full((count,), width - 1), group, rank, said)


def ratings(good: list[bool], reference: list[float], kl: float) -> RatingBatch:
    text = torch.zeros(len(good), 2, dtype=torch.int64)
    said, estimate = tensor(reference), torch.full((len(good),), kl)
    return RatingBatch(text, text == 0, text == 0, tensor([1 if g else -1 for g in good]), said, estimate)


def loss_of(row: Algorithm, logprobs: Tensor, batch: Any) -> Tensor:
    """The sum of the terms for every pair or answer, from log-probabilities of whole answers."""
    assert row.implicit_reward is not None
    terms = row.losses[type(batch)](row.implicit_reward(logprobs, batch, row.settings), batch, row.settings)
    return torch.stack(list(terms.values())).sum(0)


def gradient(row: Algorithm, logprobs: list[float], batch: Any) -> list[float]:
    leaf = tensor(logprobs, dtype=torch.float64, requires_grad=True)
    loss_of(row, leaf, batch).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


# --- where training begins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [("dpo", 0.693147), ("cdpo", 0.693147), ("ipo", 25.0), ("kto", 0.5)])
def test_the_loss_at_initialisation(name: str, expected: float) -> None:
    """Policy and reference are one: ln 2; IPO has its whole margin 1 / (2 x 0.1) before it; KTO's value is a half."""
    said = [-3.0, -11.5]
    batch = ratings([True, False], said, kl=0.0) if name == "kto" else pairs([4, 9], said)
    assert loss_of(algorithm(name), tensor(said), batch).tolist() == pytest.approx([expected] * (1 + (name == "kto")))


# --- losses and gradients by hand -------------------------------------------------------------------------------------


def test_an_answers_log_probability_is_the_sum_over_its_tokens() -> None:
    logprobs, mask = (
        tensor([[-9.0, -1.0, -2.0], [-0.5, -9.0, -9.0]]),
        tensor([[False, True, True], [True, False, False]]),
    )
    assert summed_over_answers(logprobs, mask).tolist() == [-3.0, -0.5]


def test_dpo_by_hand() -> None:
    """Better: -5 against -6 of the reference, worse: -9 against -7. Margin 0.5 (1 + 2) = 1.5."""
    row = algorithm("dpo").with_settings({"beta": 0.5})
    batch = pairs([3, 7], [-6.0, -7.0])
    assert loss_of(row, tensor([-5.0, -9.0]), batch).item() == pytest.approx(log(1 + exp(-1.5)))
    # -beta sigmoid(-margin), of the better answer, and the opposite (Rafailov et al. 2023, sec. 4).
    slope = 0.5 * sigmoid(-1.5)
    assert gradient(row, [-5.0, -9.0], batch) == pytest.approx([-slope, slope])


def test_cdpo_by_hand() -> None:
    row = algorithm("cdpo").with_settings({"beta": 0.5, "label_smoothing": 0.2})
    batch = pairs([3, 7], [-6.0, -7.0])
    expected = 0.8 * log(1 + exp(-1.5)) + 0.2 * log(1 + exp(1.5))
    assert loss_of(row, tensor([-5.0, -9.0]), batch).item() == pytest.approx(expected)
    slope = 0.5 * (0.8 * sigmoid(-1.5) - 0.2 * sigmoid(1.5))
    assert gradient(row, [-5.0, -9.0], batch) == pytest.approx([-slope, slope])


def test_robust_dpo_sees_through_the_noise() -> None:
    """Over labels of which a share is turned round, its loss is on average DPO's on the right ones."""
    row, batch = algorithm("rdpo").with_settings({"beta": 0.5, "label_smoothing": 0.2}), pairs([3, 7], [-6.0, -7.0])
    turned = pairs([7, 3], [-7.0, -6.0])
    right, wrong = tensor([-5.0, -9.0]), tensor([-9.0, -5.0])
    expected = 0.8 * loss_of(row, right, batch) + 0.2 * loss_of(row, wrong, turned)
    assert expected.item() == pytest.approx(log(1 + exp(-1.5)))


def test_ipo_by_hand() -> None:
    """A token's mean: (1 / 2) - (-2 / 4) = 1 of the wanted 1 / (2 x 0.25) = 2."""
    row = algorithm("ipo").with_settings({"beta": 0.25})
    batch = pairs([2, 4], [-6.0, -7.0])
    assert loss_of(row, tensor([-5.0, -9.0]), batch).item() == pytest.approx((1 - 2) ** 2)
    assert gradient(row, [-5.0, -9.0], batch) == pytest.approx([2 * -1 / 2, -2 * -1 / 4])


def test_simpo_by_hand() -> None:
    """A token's mean: -6 / 3 and -8 / 2; the reference has no say."""
    row = algorithm("simpo").with_settings({"beta": 2.0, "margin": 0.5})
    margin = 2.0 * (-2.0 - -4.0) - 0.5
    assert loss_of(row, tensor([-6.0, -8.0]), pairs([3, 2])).item() == pytest.approx(log(1 + exp(-margin)))
    slope = 2.0 * sigmoid(-margin)
    assert gradient(row, [-6.0, -8.0], pairs([3, 2])) == pytest.approx([-slope / 3, slope / 2])


def test_orpo_by_hand() -> None:
    """P = 1/2 a token for the better answer of 3, 1/5 for the worse of 2: odds 1 and 1/4, their ratio 4."""
    row = algorithm("orpo").with_settings({"odds_coef": 0.3})
    said = [3 * log(1 / 2), 2 * log(1 / 5)]
    terms = row.losses[PreferenceBatch](
        row.implicit_reward(tensor(said), pairs([3, 2]), row.settings), pairs([3, 2]), row.settings
    )  # type: ignore[misc]
    assert terms["nll"].item() == pytest.approx(log(2))
    assert terms["odds"].item() == pytest.approx(0.3 * log(1 + 1 / 4))
    # d log odds / d log P = 1 / (1 - P): 2 and 5 / 4; sigmoid(-log 4) = 1 / 5.
    slope = 0.3 / 5
    assert gradient(row, said, pairs([3, 2])) == pytest.approx([(-1 - slope * 2) / 3, slope * 1.25 / 2])


@pytest.mark.parametrize("mean", [-30.0, -3.0, -0.1, -1e-3, -1e-5])
def test_log_odds_keep_their_digits(mean: float) -> None:
    """log1p(-exp(.)) in double precision, also where an answer is almost certain."""
    said = tensor([mean * 4], dtype=torch.float32)
    found = log_odds_reward(said, pairs([4]), OrpoSettings())
    assert found.item() == pytest.approx(mean - log1p(-exp(mean)), rel=1e-5)


def test_the_log_odds_of_a_certain_answer_are_finite() -> None:
    said = torch.zeros(2, requires_grad=True)
    loss = loss_of(algorithm("orpo"), said, pairs([4, 4])).sum()
    loss.backward()
    assert loss.isfinite() and said.grad is not None and said.grad.isfinite().all()


def test_answers_of_one_token_by_hand() -> None:
    """Their mean is the token itself: SimPO's margin 2 (-1 + 2) - 1 = 1, IPO's -1 + 2 of the wanted 5."""
    said = tensor([-1.0, -2.0])
    assert loss_of(algorithm("simpo"), said, pairs([1, 1])).item() == pytest.approx(log(1 + exp(-1)))
    assert loss_of(algorithm("ipo"), said, pairs([1, 1], [0.0, 0.0])).item() == pytest.approx((1 - 5) ** 2)


@pytest.mark.parametrize("name", PAIRED)
def test_the_terms_have_the_names_they_are_logged_under(name: str) -> None:
    row, batch = algorithm(name), pairs([1, 1], [0.0, 0.0])
    terms = row.losses[PreferenceBatch](tensor([0.0, 0.0]), batch, row.settings)
    assert set(terms) == ({"nll", "odds"} if name == "orpo" else {"pair"})


@pytest.mark.parametrize("name", PAIRED)
def test_an_answer_without_tokens_ruins_nothing(name: str) -> None:
    """Cut before its first word: log P is 0, and nothing divides by its length."""
    assert loss_of(algorithm(name), tensor([-3.0, 0.0]), pairs([4, 0], [-2.0, 0.0])).isfinite().all()


def test_kto_by_hand() -> None:
    """Rewards 0.5 (3) and 0.5 (-1), KL 0.5 (2) = 1: the good one is half beyond it, the bad one 1.5 below it."""
    row = algorithm("kto").with_settings({"beta": 0.5, "good_weight": 2.0, "bad_weight": 3.0})
    batch = ratings([True, False], [-8.0, -4.0], kl=2.0)
    expected = [2.0 * (1 - sigmoid(0.5)), 3.0 * (1 - sigmoid(1.5))]
    assert loss_of(row, tensor([-5.0, -5.0]), batch).tolist() == pytest.approx(expected)
    slopes = [-0.5 * 2.0 * sigmoid(0.5) * sigmoid(-0.5), 0.5 * 3.0 * sigmoid(1.5) * sigmoid(-1.5)]
    assert gradient(row, [-5.0, -5.0], batch) == pytest.approx(slopes)


def test_ktos_kl_is_held_at_0() -> None:
    """An estimate below 0, which no distance is, counts as 0."""
    rewards, settings = tensor([0.3, -0.2]), KtoSettings(beta=0.5)
    below, at = (kto_loss(rewards, ratings([True, False], [0, 0], kl), settings)["rating"] for kl in (-7.0, 0.0))
    assert_close(below, at)
    assert at.tolist() == pytest.approx([sigmoid(-0.3), sigmoid(-0.2)])


def test_ktos_accuracy_by_hand() -> None:
    """The KL is worth 1: beyond it, on it, below it, for good answers and bad."""
    batch = ratings([True, True, True, False, False], [0.0] * 5, kl=2.0)
    watched = rating_statistics(tensor([1.5, 1.0, 0.5, 1.5, 0.5]), batch, KtoSettings(beta=0.5))
    assert watched["accuracy"].tolist() == [1.0, 0.5, 0.0, 0.0, 1.0]


def test_huge_margins_neither_overflow_nor_lose_the_gradient() -> None:
    for said, slope in ([1e4, -1e4], 0.0), ([-1e4, 1e4], 1.0):
        assert gradient(algorithm("dpo").with_settings({"beta": 1}), said, pairs([1, 1], [0.0, 0.0])) == [-slope, slope]


# --- optima -----------------------------------------------------------------------------------------------------------


def lowest(loss: Any, batch: PreferenceBatch) -> float:
    """The margin with the lowest loss, on a grid of thousandths."""
    margins = torch.arange(0.0, 12.0, 1e-3, dtype=torch.float64)
    values = [loss(tensor([margin / 2, -margin / 2]), batch) for margin in margins.tolist()]
    return float(margins[torch.cat(values).argmin()])


def test_cdpo_is_content_with_the_margin_that_the_noise_allows() -> None:
    """sigmoid(margin) = 1 - noise: log(0.9 / 0.1)."""
    settings = DpoSettings(label_smoothing=0.1)
    found = lowest(lambda rewards, batch: dpo_loss(rewards, batch, settings)["pair"], pairs([1, 1]))
    assert found == pytest.approx(log(9), abs=1e-3)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_ipo_is_content_with_a_margin_of_its_own(beta: float) -> None:
    found = lowest(lambda rewards, batch: ipo_loss(rewards, batch, IpoSettings(beta=beta))["pair"], pairs([1, 1]))
    assert found == pytest.approx(1 / (2 * beta), abs=1e-3)


OPTIMA = {
    0.5: [0.002144, 0.015842, 0.117059, 0.864955],
    1.0: [0.032059, 0.087144, 0.236883, 0.643914],
    2.0: [0.101536, 0.167405, 0.276004, 0.455054],
}


def solved(row: Algorithm, preferred: Any) -> list[float]:
    """The policy on four one-token answers, begun at the uniform reference, once it has learnt all comparisons.

    `preferred(i, j)`: in which share of the comparisons i wins.
    """
    times, winners, losers = 400, [], []
    for i, j in combinations(range(4), 2):
        wins = round(times * preferred(i, j))
        winners += [i] * wins + [j] * (times - wins)
        losers += [j] * wins + [i] * (times - wins)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    answers = torch.stack([tensor(winners), tensor(losers)], -1).flatten()
    totals = rankings_total([torch.arange(len(winners))])
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", tolerance_grad=1e-9, max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        said = torch.log_softmax(logits, -1)[answers]
        shares = []
        # All comparisons at once would make an N x N table of pairs; they come in parts, as in training.
        for rows in torch.arange(len(answers)).split(240):
            batch = pairs([1] * len(rows), [log(1 / 4)] * len(rows))
            prompt = batch.group[ranking_pairs(batch.group, batch.rank)[0]]
            shares.append(aggregate_pairs(loss_of(row, said[rows], batch), prompt, totals))
        loss = torch.stack(shares).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.softmax(logits, -1).tolist()


@pytest.mark.parametrize("beta", OPTIMA)
def test_dpo_recovers_the_optimal_policy_of_the_bandit(beta: float) -> None:
    """Bradley-Terry labels of the rewards 0 to 3: PPO's policy at this price on KL, pi_ref exp(r / beta)."""
    found = solved(algorithm("dpo").with_settings({"beta": beta}), lambda i, j: sigmoid(i - j))
    assert found == pytest.approx(OPTIMA[beta], abs=1e-2)


def test_cdpo_learns_what_dpo_does_from_labels_turned_round() -> None:
    """Smoothing by 0.1 is one label in ten the wrong way round, and so more careful than the optimum."""

    def turned(i: int, j: int) -> float:
        return 0.9 * sigmoid(i - j) + 0.1 * sigmoid(j - i)

    careful = solved(algorithm("cdpo").with_settings({"beta": 1.0}), lambda i, j: sigmoid(i - j))
    assert careful == pytest.approx(solved(algorithm("dpo").with_settings({"beta": 1.0}), turned), abs=5e-3)
    assert careful[3] < OPTIMA[1.0][3] - 0.05


# --- identities -------------------------------------------------------------------------------------------------------


def made_up(seed: int, rows: int = 8) -> tuple[Tensor, PreferenceBatch, RatingBatch]:
    """Log-probabilities of tokens [N, T], rankings of four prompts, and ratings of the same answers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (rows,), generator=generator)
    response = (torch.arange(9) >= 2) & (torch.arange(9) < 2 + lengths[:, None])
    logprobs = -torch.rand(rows, 9, generator=generator, dtype=torch.float64) - 0.05
    tokens, real = torch.zeros(rows, 9, dtype=torch.int64), torch.arange(9) < 2 + lengths[:, None]
    group, rank = torch.arange(rows) // 2, torch.randint(0, 3, (rows,), generator=generator)
    reference = summed_over_answers(logprobs, response) + torch.randn(rows, generator=generator, dtype=torch.float64)
    ranked = PreferenceBatch(tokens, real, response, lengths + 1, group, rank, reference)
    rating = tensor([1, -1]).repeat(rows // 2)
    return logprobs, ranked, RatingBatch(tokens, real, response, rating, reference, torch.full((rows,), 0.3))


def total(row: Algorithm, logprobs: Tensor, ranked: PreferenceBatch, rated: RatingBatch) -> Tensor:
    batch: Any = rated if RatingBatch in row.losses else ranked
    return loss_of(row, summed_over_answers(logprobs, batch.response_mask), batch).sum()


def per_row(batch: Any, change: Any) -> Any:
    return replace(batch, **{name: change(value) for name, value in vars(batch).items() if value is not None})


@pytest.mark.parametrize("name", [*PAIRED, "kto"])
@given(seed=st.integers(0, 200))
def test_only_the_answers_tokens_count(name: str, seed: int) -> None:
    """Prompts and padding may hold anything, and there may be more of them, on either side."""
    logprobs, ranked, rated = made_up(seed)
    expected = total(algorithm(name), logprobs, ranked, rated)
    spoilt = torch.where(ranked.response_mask, logprobs, torch.nan)
    assert_close(total(algorithm(name), spoilt, ranked, rated), expected)

    def wider(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (2, 3)) if value.dim() == 2 else value

    more = torch.nn.functional.pad(logprobs, (2, 3), value=-9.0)
    assert_close(total(algorithm(name), more, per_row(ranked, wider), per_row(rated, wider)), expected)


@pytest.mark.parametrize("name", [*PAIRED, "kto"])
def test_every_token_of_an_answer_counts(name: str) -> None:
    """The end mark, which is the last, too."""
    logprobs, ranked, rated = made_up(seed=3)
    logprobs.requires_grad_()
    total(algorithm(name), logprobs, replace(ranked, rank=tensor([0, 1]).repeat(4)), rated).backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad != 0, ranked.response_mask)


@pytest.mark.parametrize("name", [*PAIRED, "kto"])
@given(seed=st.integers(0, 200))
def test_the_order_of_answers_changes_nothing(name: str, seed: int) -> None:
    logprobs, ranked, rated = made_up(seed)
    order = torch.randperm(len(logprobs), generator=torch.Generator().manual_seed(seed))
    mixed = [per_row(batch, lambda value: value[order]) for batch in (ranked, rated)]
    assert_close(total(algorithm(name), logprobs[order], *mixed), total(algorithm(name), logprobs, ranked, rated))


@pytest.mark.parametrize("name", ["dpo", "cdpo"])
def test_what_prompt_and_reference_share_cancels(name: str) -> None:
    """DPO sees differences alone: nats that both answers gain change nothing, log Z of the prompt among them."""
    batch, said = pairs([3, 7], [-6.0, -7.0]), tensor([-5.0, -9.0])
    assert_close(loss_of(algorithm(name), said + 2.5, batch), loss_of(algorithm(name), said, batch))


@pytest.mark.parametrize("name", [*PAIRED, "kto"])
def test_the_better_answer_is_pulled_up_and_the_worse_one_down(name: str) -> None:
    said = [-4.0, -4.0]
    batch = ratings([True, False], said, kl=0.0) if name == "kto" else pairs([4, 4], said)
    up, down = gradient(algorithm(name), said, batch)
    assert up < 0 < down


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_say_whether_they_need_a_reference_and_what_they_learn_from() -> None:
    rows = {name: ALGORITHMS[name] for name in (*PAIRED, "kto")}
    assert {name for name, row in rows.items() if not row.roles} == {"orpo", "simpo"}
    assert all(row.roles == {"reference"} for row in rows.values() if row.roles)
    assert {name for name, row in rows.items() if RatingBatch in row.losses} == {"kto"}
    assert rows["dpo"].settings == DpoSettings(beta=0.1, label_smoothing=0.0)
    assert rows["cdpo"].settings == DpoSettings(beta=0.1, label_smoothing=0.1)
    assert rows["simpo"].settings == SimpoSettings(beta=2.0, margin=1.0)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dpo", {"beta": 0.0}, "settings.beta=0.0 must be above 0"),
        ("dpo", {"beta": float("nan")}, "settings.beta=nan must be above 0"),
        ("cdpo", {"label_smoothing": 0.5}, "settings.label_smoothing=0.5 must be at least 0 and below 0.5"),
        ("cdpo", {"label_smoothing": -0.1}, "settings.label_smoothing=-0.1"),
        ("ipo", {"label_smoothing": 0.1}, "settings.label_smoothing: unknown setting; known: beta"),
        ("ipo", {"beta": 0.0}, "settings.beta=0.0 must be above 0"),
        ("kto", {"beta": -0.1}, "settings.beta=-0.1 must be above 0"),
        ("kto", {"good_weight": 0}, "settings.good_weight=0 must be above 0"),
        ("kto", {"bad_weight": 0}, "settings.bad_weight=0 must be above 0"),
        ("orpo", {"odds_coef": -1.0}, "settings.odds_coef=-1.0 must be above 0"),
        ("online_dpo", {"beta": 0.0}, "settings.beta=0.0 must be above 0"),
        ("online_dpo", {"label_smoothing": 0.5}, "settings.label_smoothing=0.5 must be"),
        ("online_dpo", {"label_noise": -1.0}, "settings.label_noise=-1.0 must not be negative"),
        ("simpo", {"beta": 0.0}, "settings.beta=0.0 must be above 0"),
        ("simpo", {"margin": -0.5}, "settings.margin=-0.5 must not be negative"),
    ],
)
def test_settings_are_checked(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        algorithm(name).with_settings(changes)
    assert str(refused.value).startswith(said)


def test_a_margin_of_0_is_allowed() -> None:
    assert SimpoSettings(margin=0.0).margin == 0.0


def test_rows_of_other_kinds_are_refused() -> None:
    assert preference_algorithm("ipo") is ALGORITHMS["ipo"]
    with pytest.raises(
        ConfigError, match=r"algorithm='ppo': does not learn from preferences; those that do: dpo, cdpo"
    ):
        preference_algorithm("ppo")
    with pytest.raises(ConfigError, match="there is no such row"):
        preference_algorithm("dop")
