"""Policy gradients: what is maximised of a sampled token, the loss around it, and what to watch of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dressage.algorithms.kl import k2, k3
from dressage.batches import Experience, Mask, PerToken, TokenScores
from dressage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PolicyGradientSettings:
    """What is chosen about an online update."""

    clip_low: float = 0.2
    """The ratio to the old policy is not pushed below 1 - clip_low."""
    clip_high: float = 0.2
    """... nor above 1 + clip_high."""
    dual_clip: float | None = None
    """The loss of a token with a negative advantage is at most so many times its size; none: without bound."""
    value_clip: float | None = 0.2
    """A value moves at most so far from its old one at full gradient; none: not clipped."""
    value_coef: float = 0.1
    """Of the value loss, in a loss whose policy term has 1."""
    entropy_coef: float = 0.0
    """Of the entropy, in nats a token, that is subtracted from the loss."""
    kl_loss_coef: float = 0.0
    """Of the KL against the reference, in the loss. The KL in the reward has its own coefficient, which adapts."""
    full_kl: bool = False
    """That KL is taken over the whole vocabulary instead of being estimated from the sampled token."""
    old_kl_coef: float = 0.0
    """Of the KL from the old policy, in the loss: where an adapting coefficient begins."""
    stop_kl: float | None = None
    """A round's updates end once the policy is so far from the old one, in nats a token; none: all are made."""
    max_kl: float | None = None
    """An update moves the policy at most so far, in nats a token, by TRPO's own step; none: the optimizer's step."""
    curvature_share: float | None = None
    """Of the answers of an update, those that the Fisher matrix of TRPO's step is measured on; none: all."""
    redraws: int = 0
    """Further draws of prompts in a round, in place of those whose answers all score the same."""
    ptx_coef: float = 0.0
    """Of the mean loss of a token of demonstrations or pretraining text learnt in the same step; 0 is plain PPO."""
    gamma: float = 1.0
    """What a reward is worth one token earlier."""
    lam: float = 0.95
    """GAE: 1 trusts the rewards that came, 0 the value model."""
    whiten_advantages: bool = True
    """Scale a round's advantages to mean 0 and variance 1 over the tokens that count."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name not in ("dual_clip", "value_clip", "stop_kl", "max_kl", "curvature_share"):
                raise ConfigError(f"settings.{name} must be set")
        for name, high in {"clip_low": 1.0, "gamma": 1.0, "lam": 1.0}.items():
            if not 0 <= getattr(self, name) <= high:
                raise ConfigError(f"settings.{name}={getattr(self, name)} must lie between 0 and {high:g}")
        coefs = ("value_coef", "entropy_coef", "kl_loss_coef", "old_kl_coef", "ptx_coef")
        for name in ("clip_high", "value_clip", "redraws", *coefs):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ConfigError(f"settings.{name}={getattr(self, name)} must not be negative")
        for name, low in {"stop_kl": 0.0, "max_kl": 0.0, "dual_clip": 1.0}.items():
            if getattr(self, name) is not None and getattr(self, name) <= low:
                raise ConfigError(f"settings.{name}={getattr(self, name)} must be above {low:g}")
        if self.curvature_share is not None and not 0 < self.curvature_share <= 1:
            raise ConfigError(f"settings.curvature_share={self.curvature_share} must lie above 0 and not above 1")
        if self.redraws != int(self.redraws):
            raise ConfigError(f"settings.redraws={self.redraws} must be a whole number")


Surrogate = Callable[[PerToken, PerToken, Mask, PolicyGradientSettings], PerToken]
"""Of log pi_new - log pi_old, advantages and the mask: what is to be minimised for every token. Lower is better."""
Estimator = Callable[[PerToken, PerToken], PerToken]


def clipped_surrogate(
    log_ratio: PerToken,
    advantages: PerToken,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PerToken:
    """PPO's pessimistic objective for every token, negated: lower is better (Schulman et al. 2017, eq. 7).

    `log_ratio` is log pi_new - log pi_old. With `dual_clip` a bad token made much likelier costs no more than so many
    times its advantage, and no longer pulls (Ye et al. 2020, eq. 5).
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def clipped(log_ratio: PerToken, advantages: PerToken, mask: Mask, settings: PolicyGradientSettings) -> PerToken:
    """`clipped_surrogate` of every token's own ratio (PPO)."""
    return clipped_surrogate(
        log_ratio,
        advantages,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )


def sequence_clipped(
    log_ratio: PerToken, advantages: PerToken, mask: Mask, settings: PolicyGradientSettings
) -> PerToken:
    """`clipped_surrogate` of the whole answer's ratio, its length's root (GSPO: Zheng et al. 2025, eq. 5 and 7)."""
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    of_answer = log_ratio.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / length
    return clipped(of_answer.expand_as(log_ratio), advantages, mask, settings)


def unclipped(log_ratio: PerToken, advantages: PerToken, mask: Mask, settings: PolicyGradientSettings) -> PerToken:
    """-ratio x advantage: for methods that bound the step by other means (Schulman et al. 2015, eq. 14)."""
    return -log_ratio.exp() * advantages


def likelihood(log_ratio: PerToken, advantages: PerToken, mask: Mask, settings: PolicyGradientSettings) -> PerToken:
    """-advantage x log-probability, up to a constant: REINFORCE (Williams 1992)."""
    return -advantages * log_ratio


def weighted_likelihood(
    log_ratio: PerToken, advantages: PerToken, mask: Mask, settings: PolicyGradientSettings
) -> PerToken:
    """REINFORCE under a clipped ratio as a weight: no token loses its gradient (CISPO: MiniMax 2025, eq. 4)."""
    weight = log_ratio.detach().exp().clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -weight * advantages * log_ratio


def clipped_value_loss(values: PerToken, old_values: PerToken, returns: PerToken, *, clip: float | None) -> PerToken:
    """Half the squared error, or that of the value held within `clip` of its old one, whichever is the larger."""
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * error


def policy_loss(
    scores: TokenScores,
    values: PerToken | None,
    batch: Experience,
    settings: PolicyGradientSettings,
    *,
    surrogate: Surrogate = clipped,
    kl: Estimator = k2,
) -> dict[str, PerToken]:
    """Terms of the loss of every token, signed and weighted: their sum is the loss.

    "policy"; "value" if the experience has returns; "entropy", "kl" (against the reference: estimated by `kl`, or
    whole) and "old_kl" (k3 of KL(old || new), Schulman et al. 2017, eq. 8) if their coefficients are above 0.
    """
    log_ratio = _log_ratio(scores, batch)
    terms = {"policy": surrogate(log_ratio, batch.advantages, batch.response_mask, settings)}
    if batch.returns is not None:
        assert values is not None and batch.values is not None, "returns are the targets of a value model"
        terms["value"] = settings.value_coef * clipped_value_loss(
            values, batch.values, batch.returns, clip=settings.value_clip
        )
    if settings.entropy_coef > 0:
        assert scores.entropy is not None, "an entropy bonus needs the entropy"
        terms["entropy"] = -settings.entropy_coef * scores.entropy
    if settings.kl_loss_coef > 0:
        terms["kl"] = settings.kl_loss_coef * _reference_kl(scores, batch, settings, kl)
    if settings.old_kl_coef > 0:
        terms["old_kl"] = settings.old_kl_coef * k3(torch.zeros_like(log_ratio), log_ratio)
    return terms


def _reference_kl(
    scores: TokenScores, batch: Experience, settings: PolicyGradientSettings, estimate: Estimator
) -> PerToken:
    if settings.full_kl:
        assert scores.full_kl is not None, "a KL over the vocabulary needs the reference's distributions"
        return scores.full_kl
    assert batch.ref_logprobs is not None, "a KL loss needs a reference"
    return estimate(scores.logprobs, batch.ref_logprobs)


def held_back(policy_term: PerToken, logprobs: PerToken, advantages: PerToken) -> PerToken:
    """1 for every token that has an advantage and gets no gradient: where the clip took it away.

    Both tensors still hang together; the graph behind them stays.
    """
    (gradient,) = torch.autograd.grad(policy_term.sum(), logprobs, retain_graph=True)
    return ((gradient == 0) & (advantages != 0)).to(policy_term.dtype)


@torch.no_grad()
def policy_statistics(
    scores: TokenScores, values: PerToken | None, batch: Experience, settings: PolicyGradientSettings
) -> dict[str, PerToken]:
    """What to watch of every token, without gradient; average it as the loss is.

    "ratio" to the old policy; "value_clipped", 1 where the clip took the gradient away; "kl_update", k3 of
    KL(old || new) in nats; "entropy" and "full_kl" in nats, if scored.
    """
    log_ratio = _log_ratio(scores, batch)
    ratio = log_ratio.exp()
    watched = {"ratio": ratio, "kl_update": k3(torch.zeros_like(log_ratio), log_ratio)}
    if values is not None and batch.values is not None and batch.returns is not None:
        plain = clipped_value_loss(values, batch.values, batch.returns, clip=None)
        loss = clipped_value_loss(values, batch.values, batch.returns, clip=settings.value_clip)
        watched["value_clipped"] = (loss > plain).to(ratio.dtype)
    if scores.entropy is not None:
        watched["entropy"] = scores.entropy.detach()
    if scores.full_kl is not None:
        watched["full_kl"] = scores.full_kl.detach()
    return watched


def _log_ratio(scores: TokenScores, batch: Experience) -> PerToken:
    # 0 where nothing counts: whatever stands there, its exponential cannot overflow into the gradient as 0 x inf.
    return (scores.logprobs - batch.old_logprobs).masked_fill(~batch.response_mask, 0.0)
