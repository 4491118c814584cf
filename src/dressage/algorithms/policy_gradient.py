"""PPO: the clipped surrogate, the clipped value loss, and what to watch of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dressage.algorithms.kl import k2, k3
from dressage.batches import Experience, PerToken, TokenScores
from dressage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PolicyGradientSettings:
    """What is chosen about an online update."""

    clip_low: float = 0.2
    """The ratio to the old policy is not pushed below 1 - clip_low."""
    clip_high: float = 0.2
    """... nor above 1 + clip_high."""
    value_clip: float | None = 0.2
    """A value moves at most so far from its old one at full gradient; none: not clipped."""
    value_coef: float = 0.1
    """Of the value loss, in a loss whose policy term has 1."""
    entropy_coef: float = 0.0
    """Of the entropy, in nats a token, that is subtracted from the loss."""
    kl_loss_coef: float = 0.0
    """Of k2 against the reference, in the loss. The KL in the reward has its own coefficient, which adapts."""
    ptx_coef: float = 0.0
    """Of the mean loss of a token of demonstrations or pretraining text learnt in the same step; 0 is plain PPO."""
    gamma: float = 1.0
    """What a reward is worth one token earlier."""
    lam: float = 0.95
    """GAE: 1 trusts the rewards that came, 0 the value model."""
    whiten_advantages: bool = True
    """Scale a round's advantages to mean 0 and variance 1 over the tokens that count."""

    def __post_init__(self) -> None:
        for name, high in {"clip_low": 1.0, "gamma": 1.0, "lam": 1.0}.items():
            if not 0 <= getattr(self, name) <= high:
                raise ConfigError(f"settings.{name}={getattr(self, name)} must lie between 0 and {high:g}")
        for name in ("clip_high", "value_clip", "value_coef", "entropy_coef", "kl_loss_coef", "ptx_coef"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ConfigError(f"settings.{name}={getattr(self, name)} must not be negative")


def clipped_surrogate(log_ratio: PerToken, advantages: PerToken, *, clip_low: float, clip_high: float) -> PerToken:
    """PPO's pessimistic objective for every token, negated: lower is better (Schulman et al. 2017, eq. 7).

    `log_ratio` is log pi_new - log pi_old.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_value_loss(values: PerToken, old_values: PerToken, returns: PerToken, *, clip: float | None) -> PerToken:
    """Half the squared error, or that of the value held within `clip` of its old one, whichever is the larger."""
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * error


def ppo_loss(
    scores: TokenScores, values: PerToken | None, batch: Experience, settings: PolicyGradientSettings
) -> dict[str, PerToken]:
    """Terms of the loss of every token, signed and weighted: their sum is the loss.

    "policy"; "value" if the experience has returns; "entropy" and "kl" if their coefficients are above 0.
    """
    terms = {
        "policy": clipped_surrogate(
            _log_ratio(scores, batch), batch.advantages, clip_low=settings.clip_low, clip_high=settings.clip_high
        )
    }
    if batch.returns is not None:
        assert values is not None and batch.values is not None, "returns are the targets of a value model"
        terms["value"] = settings.value_coef * clipped_value_loss(
            values, batch.values, batch.returns, clip=settings.value_clip
        )
    if settings.entropy_coef > 0:
        assert scores.entropy is not None, "an entropy bonus needs the entropy"
        terms["entropy"] = -settings.entropy_coef * scores.entropy
    if settings.kl_loss_coef > 0:
        assert batch.ref_logprobs is not None, "a KL loss needs a reference"
        terms["kl"] = settings.kl_loss_coef * k2(scores.logprobs, batch.ref_logprobs)
    return terms


@torch.no_grad()
def ppo_statistics(
    scores: TokenScores, values: PerToken | None, batch: Experience, settings: PolicyGradientSettings
) -> dict[str, PerToken]:
    """What to watch of every token, without gradient; average it as the loss is.

    "ratio" to the old policy; "clipped" and "value_clipped", 1 where the clip took the gradient away; "kl_update",
    k3 of KL(old || new) in nats; "entropy" in nats, if scored.
    """
    log_ratio = _log_ratio(scores, batch)
    ratio = log_ratio.exp()
    too_high = (ratio > 1 + settings.clip_high) & (batch.advantages > 0)
    too_low = (ratio < 1 - settings.clip_low) & (batch.advantages < 0)
    watched = {
        "ratio": ratio,
        "clipped": (too_high | too_low).to(ratio.dtype),
        "kl_update": k3(torch.zeros_like(log_ratio), log_ratio),
    }
    if values is not None and batch.values is not None and batch.returns is not None:
        plain = clipped_value_loss(values, batch.values, batch.returns, clip=None)
        loss = clipped_value_loss(values, batch.values, batch.returns, clip=settings.value_clip)
        watched["value_clipped"] = (loss > plain).to(ratio.dtype)
    if scores.entropy is not None:
        watched["entropy"] = scores.entropy.detach()
    return watched


def _log_ratio(scores: TokenScores, batch: Experience) -> PerToken:
    # 0 where nothing counts: whatever stands there, its exponential cannot overflow into the gradient as 0 x inf.
    return (scores.logprobs - batch.old_logprobs).masked_fill(~batch.response_mask, 0.0)
