"""Learning what people prefer from rankings: Bradley-Terry on all pairs of a prompt's answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dressage.algorithms.supervised import negative_log_likelihood
from dressage.batches import Ints, PerSequence, PerToken, PreferenceBatch, Scalar, SupervisedBatch, TokenScores
from dressage.errors import ConfigError

PerPair = Tensor
PairLoss = Callable[[PerPair, PerPair, PerPair | float], PerPair]
Ties = Literal["half", "rao_kupper"]


@dataclass(frozen=True, kw_only=True)
class RankingSettings:
    """What is chosen about learning from rankings."""

    margin: float = 0.0
    """By how much the better answer should win: times the difference of the two answers' grades where they have such
    (Touvron et al. 2023, eq. 2)."""
    ties: Ties | None = None
    """What a tie teaches. half: it is half a win for each; rao_kupper: the scores lie within the margin; none: nothing.
    """
    lm_coef: float = 0.0
    """Weight of imitating the best answers beside the ranking (Askell et al. 2021, sec. 4.1); it keeps the language."""

    def __post_init__(self) -> None:
        if self.lm_coef < 0:
            raise ConfigError(f"settings.lm_coef={self.lm_coef} must not be negative")
        if self.margin < 0:
            raise ConfigError(f"settings.margin={self.margin} must not be negative")
        if self.ties not in (None, *get_args(Ties)):
            raise ConfigError(f"settings.ties={self.ties!r}: unknown; known: {', '.join(get_args(Ties))}")
        if self.ties == "rao_kupper" and self.margin == 0:
            raise ConfigError('settings.ties="rao_kupper" needs settings.margin above 0: within it nobody wins')


@dataclass(frozen=True, kw_only=True)
class RegressionSettings:
    """Learning grades has nothing to choose."""


def log_sig(chosen: PerPair, rejected: PerPair, margin: PerPair | float = 0.0) -> PerPair:
    """-log sigmoid(chosen - rejected - margin), in fp32 and without overflow (Ouyang et al. 2022, eq. 1)."""
    return softplus(_shortfall(chosen, rejected, margin))


def log_exp(chosen: PerPair, rejected: PerPair, margin: PerPair | float = 0.0) -> PerPair:
    """log(1 + exp(rejected - chosen + margin)): the same number as `log_sig`, under ColossalChat's name."""
    shortfall = _shortfall(chosen, rejected, margin)
    return torch.logaddexp(torch.zeros_like(shortfall), shortfall)


def half_won(one: PerPair, other: PerPair, pair_loss: PairLoss = log_sig) -> PerPair:
    """A tie is half a win for each: least, ln 2, at equal scores."""
    return (pair_loss(one, other, 0.0) + pair_loss(other, one, 0.0)) / 2


def within_margin(one: PerPair, other: PerPair, margin: float) -> PerPair:
    """-log of the probability of a tie, where the better answer wins with sigmoid(difference - margin).

    What is left of 1 is (exp(2 margin) - 1) sigmoid(d - margin) sigmoid(-d - margin) (Rao and Kupper 1967,
    with theta = exp(margin)).
    """
    return log_sig(one, other, margin) + log_sig(other, one, margin) - math.log(math.expm1(2 * margin))


def ranking_pairs(group: Ints, rank: Ints) -> tuple[Ints, Ints]:
    """Rows (better, worse) of every two answers of one prompt with different ranks; equal ranks make no pair.

    group [N] and rank [N] (0 is best) -> two tensors [P]; K answers without ties make K (K - 1) / 2 pairs.
    """
    siblings = group[:, None] == group[None, :]
    better, worse = (siblings & (rank[:, None] < rank[None, :])).nonzero(as_tuple=True)
    return better, worse


def tied_pairs(group: Ints, rank: Ints) -> tuple[Ints, Ints]:
    """Rows of every two answers of one prompt with equal ranks, each pair once: two tensors [P]."""
    alike = (group[:, None] == group[None, :]) & (rank[:, None] == rank[None, :])
    one, other = alike.triu(1).nonzero(as_tuple=True)
    return one, other


def ranking_loss(
    rewards: PerSequence, batch: PreferenceBatch, settings: RankingSettings, *, pair_loss: PairLoss = log_sig
) -> dict[str, PerPair]:
    """Terms of the loss of every pair of `learnt_from`, in its order: "pair". Average with `aggregate_pairs`."""
    better, worse = ranking_pairs(batch.group, batch.rank)
    margin: PerPair | float = settings.margin
    if batch.grade is not None and settings.margin:
        # Where nobody said how strongly it won, it won by 1.
        margin = settings.margin * (batch.grade[better] - batch.grade[worse]).nan_to_num(1.0)
    won = pair_loss(rewards[better], rewards[worse], margin)
    if settings.ties is None:
        return {"pair": won}
    one, other = (rewards[rows] for rows in tied_pairs(batch.group, batch.rank))
    tied = half_won(one, other, pair_loss) if settings.ties == "half" else within_margin(one, other, settings.margin)
    return {"pair": torch.cat([won, tied])}


def learnt_from(batch: PreferenceBatch, settings: object) -> Ints:
    """The prompt of each value of a row's loss: of every ordered pair, and of the ties behind them if they teach.

    Of regression, the prompt of every answer.
    """
    if isinstance(settings, RegressionSettings):
        return batch.group
    better, _ = ranking_pairs(batch.group, batch.rank)
    if not isinstance(settings, RankingSettings) or settings.ties is None:
        return batch.group[better]
    one, _ = tied_pairs(batch.group, batch.rank)
    return torch.cat([batch.group[better], batch.group[one]])


def best_answers(batch: PreferenceBatch) -> SupervisedBatch:
    """The answers that are better than another to their prompt and worse than none, to be imitated."""
    better, worse = ranking_pairs(batch.group, batch.rank)
    best = better.unique()
    best = best[~torch.isin(best, worse)]
    return SupervisedBatch(batch.tokens[best], batch.attention_mask[best], batch.response_mask[best])


def imitation_loss(scores: TokenScores, batch: SupervisedBatch, settings: RankingSettings) -> dict[str, PerToken]:
    """Terms of the loss of every token beside a ranking loss: "imitation", lm_coef times its surprise."""
    return {"imitation": settings.lm_coef * negative_log_likelihood(scores.logprobs)}


def regression_loss(
    rewards: PerSequence, batch: PreferenceBatch, settings: RegressionSettings
) -> dict[str, PerSequence]:
    """Terms of the loss of every answer: "squared_error" against its grade, in fp32."""
    assert batch.grade is not None
    return {"squared_error": (rewards.float() - batch.grade).square()}


@torch.no_grad()
def ranking_statistics(rewards: PerSequence, batch: PreferenceBatch) -> dict[str, PerPair]:
    """What to watch of every pair: "accuracy" (1 ordered rightly, 0 wrongly, 1/2 undecided) and "margin"."""
    better, worse = ranking_pairs(batch.group, batch.rank)
    margin = rewards[better].float() - rewards[worse].float()
    return {"accuracy": (margin.sign() + 1) / 2, "margin": margin}


def affine_normalisation(scores: PerSequence) -> tuple[Scalar, Scalar]:
    """(gain, bias) such that gain * scores + bias has mean 0 and population deviation 1.

    Equal scores, which no gain can spread, keep gain 1.
    """
    scores = scores.double()
    deviation = scores.std(correction=0)
    gain = torch.where(deviation > 0, 1 / deviation, 1.0)
    return gain, -gain * scores.mean()


def _shortfall(chosen: PerPair, rejected: PerPair, margin: PerPair | float) -> PerPair:
    wide = torch.promote_types(chosen.dtype, torch.float32)
    return rejected.to(wide) - chosen.to(wide) + margin
