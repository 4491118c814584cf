"""Learning straight from preferences: what a policy says of an answer is read as its reward, and that is ranked.

A method is a reading of log-probabilities as a reward, and a loss on rewards. Of the answers' log-probabilities only
the sums over their tokens are needed, end mark included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from dressage.algorithms.reward_modeling import PerPair, log_sig, ranking_pairs
from dressage.batches import Mask, PerSequence, PerToken, PreferenceBatch, RatingBatch
from dressage.errors import ConfigError

Judged = PreferenceBatch | RatingBatch
ImplicitReward = Callable[..., PerSequence]
"""Rewards [N] from (answer_logprobs [N], batch, settings)."""


@dataclass(frozen=True, kw_only=True)
class DpoSettings:
    """What is chosen about DPO and cDPO."""

    beta: float = 0.1
    """Price of a nat away from the reference: more keeps closer."""
    label_smoothing: float = 0.0
    """How likely a preference is noted the wrong way round."""

    def __post_init__(self) -> None:
        _require_above_0(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"settings.label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")


@dataclass(frozen=True, kw_only=True)
class OnlineDpoSettings:
    """What is chosen about DPO on the policy's own answers, ranked by a reward model."""

    beta: float = 0.1
    """Price of a nat away from the reference: more keeps closer."""
    label_smoothing: float = 0.0
    """How likely the reward model is wrong about a pair."""
    label_noise: float = 0.0
    """i beats j with probability sigmoid((score_i - score_j) / label_noise); 0: the higher score always wins."""
    all_pairs: bool = False
    """Learn every two answers to a prompt; else the best against the worst."""

    def __post_init__(self) -> None:
        DpoSettings(beta=self.beta, label_smoothing=self.label_smoothing)
        if not self.label_noise >= 0:
            raise ConfigError(f"settings.label_noise={self.label_noise} must not be negative")


@dataclass(frozen=True, kw_only=True)
class IpoSettings:
    """What is chosen about IPO."""

    beta: float = 0.1
    """The paper's tau: the better answer is to win by 1 / (2 beta) nats a token, and by no more."""

    def __post_init__(self) -> None:
        _require_above_0(self, "beta")


@dataclass(frozen=True, kw_only=True)
class KtoSettings:
    """What is chosen about KTO."""

    beta: float = 0.1
    """Price of a nat away from the reference: more keeps closer."""
    good_weight: float = 1.0
    """Of a good answer's loss; more where good answers are few."""
    bad_weight: float = 1.0
    """Of a bad answer's loss; more where bad answers are few."""

    def __post_init__(self) -> None:
        _require_above_0(self, "beta", "good_weight", "bad_weight")


@dataclass(frozen=True, kw_only=True)
class OrpoSettings:
    """What is chosen about ORPO."""

    odds_coef: float = 0.1
    """Of the odds-ratio term, beside imitation of the better answer, which has 1."""

    def __post_init__(self) -> None:
        _require_above_0(self, "odds_coef")


@dataclass(frozen=True, kw_only=True)
class SimpoSettings:
    """What is chosen about SimPO."""

    beta: float = 2.0
    """What a nat a token is worth."""
    margin: float = 1.0
    """The paper's gamma: by how much the better answer should win; half of beta or less."""

    def __post_init__(self) -> None:
        _require_above_0(self, "beta")
        if not self.margin >= 0:
            raise ConfigError(f"settings.margin={self.margin} must not be negative")


# --- readings of log-probabilities as rewards -------------------------------------------------------------------------


def summed_over_answers(logprobs: PerToken, response_mask: Mask) -> PerSequence:
    """Log-probability [N] of each whole answer from its tokens' [N, T]."""
    return logprobs.masked_fill(~response_mask, 0.0).sum(-1)


def log_ratio(answer_logprobs: PerSequence, batch: Judged) -> PerSequence:
    """log policy - log reference of each whole answer, in nats."""
    assert batch.ref_answer_logprobs is not None, "this method needs a reference"
    return answer_logprobs - batch.ref_answer_logprobs


def log_ratio_reward(
    answer_logprobs: PerSequence, batch: Judged, settings: DpoSettings | OnlineDpoSettings | KtoSettings
) -> PerSequence:
    """beta log(policy / reference): the reward the policy is optimal for (Rafailov et al. 2023, eq. 5, less log Z)."""
    return settings.beta * log_ratio(answer_logprobs, batch)


def mean_log_ratio_reward(answer_logprobs: PerSequence, batch: Judged, settings: IpoSettings) -> PerSequence:
    """log(policy / reference), a token's mean, so that long answers cannot win by their length alone."""
    return log_ratio(answer_logprobs, batch) / _lengths(batch)


def mean_logprob_reward(answer_logprobs: PerSequence, batch: Judged, settings: SimpoSettings) -> PerSequence:
    """beta times a token's mean log-probability; no reference (Meng et al. 2024, eq. 4)."""
    return settings.beta * answer_logprobs / _lengths(batch)


def log_odds_reward(answer_logprobs: PerSequence, batch: Judged, settings: OrpoSettings) -> PerSequence:
    """log P / (1 - P) with log P a token's mean log-probability; no reference (Hong et al. 2024, eq. 4)."""
    mean = answer_logprobs / _lengths(batch)
    # log1p(-exp(mean)), in the form that keeps its digits near 0; a certain answer has large odds, not infinite ones.
    mean = mean.clamp(max=-1e-6)
    return mean - (-mean.expm1()).log()


# --- losses -----------------------------------------------------------------------------------------------------------


def dpo_loss(
    rewards: PerSequence, batch: PreferenceBatch, settings: DpoSettings | OnlineDpoSettings
) -> dict[str, PerPair]:
    """Terms of the loss of every pair: "pair", -log sigmoid of the difference (Rafailov et al. 2023, eq. 7).

    With label smoothing the pair counts the other way round with that weight (cDPO; Mitchell 2023).
    """
    chosen, rejected = _pairs(rewards, batch)
    noise = settings.label_smoothing
    return {"pair": (1 - noise) * log_sig(chosen, rejected) + noise * log_sig(rejected, chosen)}


def robust_dpo_loss(rewards: PerSequence, batch: PreferenceBatch, settings: DpoSettings) -> dict[str, PerPair]:
    """Terms of the loss of every pair: "pair", DPO's freed of the noise in the labels (Chowdhury et al. 2024).

    If a share `label_smoothing` of the labels is the wrong way round, its expectation is DPO's loss on the right ones.
    """
    chosen, rejected = _pairs(rewards, batch)
    noise = settings.label_smoothing
    clean = (1 - noise) * log_sig(chosen, rejected) - noise * log_sig(rejected, chosen)
    return {"pair": clean / (1 - 2 * noise)}


def ipo_loss(rewards: PerSequence, batch: PreferenceBatch, settings: IpoSettings) -> dict[str, PerPair]:
    """Terms of the loss of every pair: "pair", (difference - 1 / (2 beta)) squared (Azar et al. 2023, eq. 17)."""
    chosen, rejected = _pairs(rewards, batch)
    return {"pair": (chosen - rejected - 1 / (2 * settings.beta)).square()}


def simpo_loss(rewards: PerSequence, batch: PreferenceBatch, settings: SimpoSettings) -> dict[str, PerPair]:
    """Terms of the loss of every pair: "pair", -log sigmoid(difference - margin) (Meng et al. 2024, eq. 6)."""
    return {"pair": log_sig(*_pairs(rewards, batch), settings.margin)}


def orpo_loss(rewards: PerSequence, batch: PreferenceBatch, settings: OrpoSettings) -> dict[str, PerPair]:
    """Terms of the loss of every pair: "nll" of the better answer, a token's mean, and "odds".

    Hong et al. 2024, eq. 6 and 7. `rewards` are log-odds, and -log P is softplus(-log-odds).
    """
    chosen, rejected = _pairs(rewards, batch)
    return {"nll": softplus(-chosen), "odds": settings.odds_coef * log_sig(chosen, rejected)}


def kto_loss(rewards: PerSequence, batch: RatingBatch, settings: KtoSettings) -> dict[str, PerSequence]:
    """Terms of the loss of every answer: "rating", its weight less its value (Ethayarajh et al. 2024, eq. 8).

    The value is judged from the KL to the reference, an estimate that is held at 0 or above and has no gradient.
    """
    weight = torch.where(batch.rating > 0, settings.good_weight, settings.bad_weight)
    return {"rating": weight * torch.sigmoid(-_beyond_kl(rewards, batch, settings))}


@torch.no_grad()
def rating_statistics(rewards: PerSequence, batch: RatingBatch, settings: KtoSettings) -> dict[str, PerSequence]:
    """What to watch of every answer: "accuracy", 1 on the right side of the KL, 0 on the wrong one, 1/2 on it."""
    return {"accuracy": (_beyond_kl(rewards, batch, settings).sign() + 1) / 2}


def _beyond_kl(rewards: PerSequence, batch: RatingBatch, settings: KtoSettings) -> PerSequence:
    """How far the reward lies beyond the KL's, in the direction of the rating."""
    assert batch.kl is not None, "the KL is estimated before the loss"
    return batch.rating * (rewards - settings.beta * batch.kl.clamp(min=0))


def _pairs(rewards: PerSequence, batch: PreferenceBatch) -> tuple[PerPair, PerPair]:
    better, worse = ranking_pairs(batch.group, batch.rank)
    return rewards[better], rewards[worse]


def _lengths(batch: Judged) -> PerSequence:
    # An answer that was cut before its first word has no tokens; its mean is then 0, not 0 / 0.
    return batch.response_mask.sum(-1).clamp(min=1)


def _require_above_0(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise ConfigError(f"settings.{name}={getattr(settings, name)} must be above 0")
