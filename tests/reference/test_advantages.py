"""GAE against a double loop over the definition, its limits, gaps; groups by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from dressage.algorithms.advantages import (
    actor_critic,
    gae,
    group_centered,
    group_normalized,
    leave_one_out,
    monte_carlo,
    of_answers,
)

seeds = st.integers(0, 10_000)
shares = st.sampled_from([0.0, 0.3, 0.95, 1.0])


def episode(seed: int, rows: int = 4, width: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with gaps, prompt and padding."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return rewards, values, torch.rand(rows, width, generator=generator) < 0.6


def slow_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The definition: sum over k of (gamma lambda)^k times the TD error k chosen tokens on."""
    result = torch.zeros_like(values)
    for row in range(len(values)):
        chosen = [t for t in range(values.shape[1]) if mask[row, t]]
        r, v = [rewards[row, t].item() for t in chosen], [values[row, t].item() for t in chosen] + [0.0]
        for i, t in enumerate(chosen):
            for k in range(len(chosen) - i):
                error = r[i + k] + gamma * v[i + k + 1] - v[i + k]
                result[row, t] += (gamma * lam) ** k * error
    return result


@given(seeds, shares, shares)
def test_gae_is_its_definition(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = episode(seed)
    assert_close(gae(rewards, values, mask, gamma=gamma, lam=lam), slow_gae(rewards, values, mask, gamma, lam))


def test_gae_by_hand_over_a_gap() -> None:
    """Two chosen tokens with tool output between: gamma 0.9, lambda 0.5. The gap's numbers are not looked at."""
    rewards = tensor([[9.0, 1.0, 9.0, 2.0, 9.0]])
    values = tensor([[9.0, 0.5, 9.0, 1.5, 9.0]])
    mask = tensor([[False, True, False, True, False]])
    last = 2.0 - 1.5
    first = 1.0 + 0.9 * 1.5 - 0.5 + 0.9 * 0.5 * last
    assert_close(gae(rewards, values, mask, gamma=0.9, lam=0.5), tensor([[0.0, first, 0.0, last, 0.0]]))


def test_gae_of_an_answer_of_one_token() -> None:
    """Nothing comes after it: what it earned less what was expected."""
    assert gae(tensor([[2.0]]), tensor([[0.5]]), tensor([[True]]), gamma=0.9, lam=0.5).tolist() == [[1.5]]


@given(seeds, shares)
def test_lambda_1_is_monte_carlo_minus_value(seed: int, gamma: float) -> None:
    rewards, values, mask = episode(seed)
    to_go = torch.zeros_like(rewards)
    for row, t in mask.nonzero().tolist():
        later = rewards[row, t:][mask[row, t:]]
        to_go[row, t] = sum(gamma**k * reward for k, reward in enumerate(later.tolist()))
    assert_close(gae(rewards, values, mask, gamma=gamma, lam=1.0), (to_go - values) * mask)
    assert_close(monte_carlo(rewards, mask, gamma=gamma), to_go)


@given(seeds, shares)
def test_lambda_0_is_the_td_error(seed: int, gamma: float) -> None:
    rewards, values, _ = episode(seed)
    everywhere = torch.ones_like(values, dtype=torch.bool)
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1, dtype=values.dtype)], -1)
    assert_close(gae(rewards, values, everywhere, gamma=gamma, lam=0.0), rewards + gamma * following - values)


@given(seeds, st.integers(0, 3), st.integers(0, 3))
def test_padding_changes_nothing(seed: int, before: int, after: int) -> None:
    rewards, values, mask = episode(seed)
    padded = torch.nn.functional.pad
    advantages = gae(
        padded(rewards, (before, after), value=7.0),
        padded(values, (before, after), value=-7.0),
        padded(mask, (before, after), value=False),
        gamma=0.9,
        lam=0.8,
    )
    width = values.shape[1]
    assert_close(advantages[:, before : before + width], gae(rewards, values, mask, gamma=0.9, lam=0.8))
    assert (advantages[:, :before] == 0).all() and (advantages[:, before + width :] == 0).all()


SCORES = tensor([1.0, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 10])
PROMPTS = tensor([0, 1, 2] * 4)


def test_leave_one_out_by_hand() -> None:
    """Four answers to three prompts, answer by answer."""
    advantages = leave_one_out(SCORES, PROMPTS)
    assert_close(advantages[0], tensor(1 - (2 + 5 + 8) / 3))
    assert_close(advantages[7], tensor(6 - (2 + 3 + 9) / 3))
    assert advantages[0].item() == pytest.approx(-4.0) and advantages[7].item() == pytest.approx(4 / 3)


def test_group_normalized_by_hand() -> None:
    """Scores 1, 2, 5, 8: mean 4, population variance 7.5."""
    advantages = group_normalized(SCORES, PROMPTS)[PROMPTS == 0]
    assert_close(advantages, tensor([-3.0, -2.0, 1.0, 4.0]) / 7.5**0.5)
    damped = group_normalized(SCORES, PROMPTS, epsilon=0.5)[PROMPTS == 0]
    assert_close(damped, tensor([-3.0, -2.0, 1.0, 4.0]) / (7.5**0.5 + 0.5))


@given(seeds)
def test_group_identities(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(12, generator=generator, dtype=torch.float64)
    order = torch.randperm(12, generator=generator)
    for compare in (group_centered, group_normalized, leave_one_out):
        advantages = compare(scores, PROMPTS)
        for prompt in range(3):
            assert abs(advantages[prompt == PROMPTS].sum()) < 1e-9
        assert_close(compare(scores[order], PROMPTS[order]), advantages[order])
    assert_close(leave_one_out(scores, PROMPTS), 4 / 3 * group_centered(scores, PROMPTS))


@pytest.mark.parametrize("score", [0.0, 0.1, 123.456, -1e4])
def test_a_group_that_scores_the_same_teaches_nothing(score: float) -> None:
    assert group_normalized(torch.full((3,), score), tensor([4, 4, 4])).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("compare", [group_centered, group_normalized, leave_one_out])
def test_an_answer_without_siblings_is_refused(compare: object) -> None:
    assert callable(compare)
    with pytest.raises(AssertionError, match="siblings"):
        compare(tensor([1.0, 2.0, 3.0]), tensor([0, 0, 1]))


def test_an_answers_advantage_is_that_of_all_its_tokens() -> None:
    """Rewards add up over an answer, what lies outside does not count; the better answer gets +2, the worse -2."""
    rewards = tensor([[99.0, 1.0, 2.0], [99.0, 7.0, 99.0]])
    mask = tensor([[False, True, True], [False, True, False]])
    advantages = of_answers(group_centered)(rewards, None, mask, tensor([3, 3]), gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[0.0, -2.0, -2.0], [0.0, 2.0, 0.0]]


def test_an_actor_needs_its_critic() -> None:
    with pytest.raises(AssertionError, match="critic"):
        actor_critic(tensor([[1.0]]), None, tensor([[True]]), tensor([0]), gamma=1.0, lam=1.0)
