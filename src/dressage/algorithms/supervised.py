"""Learning by imitation: demonstrations, and pretraining text beside reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass

from dressage.algorithms.policy_gradient import PolicyGradientSettings
from dressage.batches import PerToken, SupervisedBatch, TokenScores


@dataclass(frozen=True)
class SupervisedSettings:
    """Imitation has nothing to choose."""


def negative_log_likelihood(logprobs: PerToken) -> PerToken:
    """Surprise at every token, in nats."""
    return -logprobs


def supervised_loss(scores: TokenScores, batch: SupervisedBatch, settings: SupervisedSettings) -> dict[str, PerToken]:
    """Terms of the loss of every token: "nll"."""
    return {"nll": negative_log_likelihood(scores.logprobs)}


def ptx_loss(scores: TokenScores, batch: SupervisedBatch, settings: PolicyGradientSettings) -> dict[str, PerToken]:
    """Terms of the loss of every token beside PPO: "ptx", gamma times its surprise (Ouyang et al. 2022, eq. 2)."""
    return {"ptx": settings.ptx_coef * negative_log_likelihood(scores.logprobs)}
