"""From rewards to advantages: how much better a token, or a whole answer, was than expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from dressage.batches import Ints, Mask, PerSequence, PerToken
from dressage.tensors import group_mean, group_size, masked_mean


class Advantage(Protocol):
    """How rewards [B, T], values [B, T] and the answers' groups [B] become advantages [B, T]; 0 outside the mask."""

    def __call__(
        self, rewards: PerToken, values: PerToken | None, mask: Mask, group: Ints, *, gamma: float, lam: float
    ) -> PerToken:
        """See the class."""
        ...


def actor_critic(
    rewards: PerToken, values: PerToken | None, mask: Mask, group: Ints, *, gamma: float, lam: float
) -> PerToken:
    """Against a value model: `gae`."""
    assert values is not None, "an actor needs its critic's values"
    return gae(rewards, values, mask, gamma=gamma, lam=lam)


def reward_to_go(
    rewards: PerToken, values: PerToken | None, mask: Mask, group: Ints, *, gamma: float, lam: float
) -> PerToken:
    """Against nothing: the discounted rewards from each token on (`monte_carlo`)."""
    return monte_carlo(rewards, mask, gamma=gamma)


def against_batch(
    rewards: PerToken, values: PerToken | None, mask: Mask, group: Ints, *, gamma: float, lam: float
) -> PerToken:
    """Against the mean reward-to-go of all the round's tokens: REINFORCE's baseline (Williams 1992)."""
    came = monte_carlo(rewards, mask, gamma=gamma)
    return (came - masked_mean(came, mask)).masked_fill(~mask, 0.0)


def of_answers(compare: Callable[[PerSequence, Ints], PerSequence]) -> Advantage:
    """Against the other answers to the prompt: every token of an answer gets its answer's advantage.

    An answer of which no token counts has no advantage, but the others are compared with it.
    """

    def advantage(
        rewards: PerToken, values: PerToken | None, mask: Mask, group: Ints, *, gamma: float, lam: float
    ) -> PerToken:
        left_out = ~mask.any(-1, keepdim=True)
        totals = rewards.masked_fill(~(mask | left_out), 0.0).sum(-1)
        return compare(totals, group)[:, None] * mask

    return advantage


def gae(rewards: PerToken, values: PerToken, mask: Mask, *, gamma: float, lam: float) -> PerToken:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), 0 outside the mask.

    `values` are of the state a token is chosen in. Tokens the policy did not choose (prompt, tool output, padding) are
    skipped, not visited: the next state of a chosen token is that of the next chosen one, and the last one has none.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        error = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = error + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages


def monte_carlo(rewards: PerToken, mask: Mask, *, gamma: float) -> PerToken:
    """Discounted sum of the rewards from each chosen token on: what GAE is at lambda 1 against values of 0."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)


def group_centered(rewards: PerSequence, group: Ints) -> PerSequence:
    """How much better an answer is than the mean of its group (Liu et al. 2025, Dr. GRPO)."""
    assert (group_size(group) > 1).all(), "an answer without siblings cannot be compared"
    return rewards - group_mean(rewards, group)


def group_normalized(rewards: PerSequence, group: Ints, *, epsilon: float = 1e-6) -> PerSequence:
    """How much better an answer is than its siblings, in standard deviations (Shao et al. 2024, sec. 4.1.2).

    A group whose answers all score the same teaches nothing and gets zeros.
    """
    centered = group_centered(rewards, group)
    # Population deviation: defined for every group, and the same for an answer copied twice.
    deviation = group_mean(centered.square(), group).sqrt()
    return centered / (deviation + epsilon)


def leave_one_out(rewards: PerSequence, group: Ints) -> PerSequence:
    """How much better an answer is than the mean of the others of its group (Ahmadian et al. 2024, eq. 8)."""
    size = group_size(group)
    return group_centered(rewards, group) * size / (size - 1)
