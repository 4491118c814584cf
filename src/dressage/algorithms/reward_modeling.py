"""Learning what people prefer from rankings: Bradley-Terry on all pairs of a prompt's answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dressage.batches import Ints, PerSequence, PreferenceBatch, Scalar
from dressage.errors import ConfigError

PerPair = Tensor
PairLoss = Callable[[PerPair, PerPair, float], PerPair]


@dataclass(frozen=True, kw_only=True)
class RankingSettings:
    """What is chosen about learning from rankings."""

    margin: float = 0.0
    """By how much the better answer should win."""

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ConfigError(f"settings.margin={self.margin} must not be negative")


def log_sig(chosen: PerPair, rejected: PerPair, margin: float = 0.0) -> PerPair:
    """-log sigmoid(chosen - rejected - margin), in fp32 and without overflow (Ouyang et al. 2022, eq. 1)."""
    return softplus(_shortfall(chosen, rejected, margin))


def log_exp(chosen: PerPair, rejected: PerPair, margin: float = 0.0) -> PerPair:
    """log(1 + exp(rejected - chosen + margin)): the same number as `log_sig`, under ColossalChat's name."""
    shortfall = _shortfall(chosen, rejected, margin)
    return torch.logaddexp(torch.zeros_like(shortfall), shortfall)


def ranking_pairs(group: Ints, rank: Ints) -> tuple[Ints, Ints]:
    """Rows (better, worse) of every two answers of one prompt with different ranks; equal ranks make no pair.

    group [N] and rank [N] (0 is best) -> two tensors [P]; K answers without ties make K (K - 1) / 2 pairs.
    """
    siblings = group[:, None] == group[None, :]
    better, worse = (siblings & (rank[:, None] < rank[None, :])).nonzero(as_tuple=True)
    return better, worse


def ranking_loss(
    rewards: PerSequence, batch: PreferenceBatch, settings: RankingSettings, *, pair_loss: PairLoss = log_sig
) -> dict[str, PerPair]:
    """Terms of the loss of every pair of `ranking_pairs`, in its order: "pair". Average with `aggregate_pairs`."""
    better, worse = ranking_pairs(batch.group, batch.rank)
    return {"pair": pair_loss(rewards[better], rewards[worse], settings.margin)}


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


def _shortfall(chosen: PerPair, rejected: PerPair, margin: float) -> PerPair:
    wide = torch.promote_types(chosen.dtype, torch.float32)
    return rejected.to(wide) - chosen.to(wide) + margin
