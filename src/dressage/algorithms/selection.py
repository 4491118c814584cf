"""Choosing among sampled answers by their scores: best of n, what to imitate, what to rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dressage.algorithms.preference import OnlineDpoSettings, summed_over_answers
from dressage.algorithms.reward_modeling import ranking_pairs
from dressage.batches import Experience, Ints, Mask, PerSequence, PreferenceBatch, SupervisedBatch
from dressage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """Which of a round's answers are imitated: those that pass all three."""

    best: int | None = 1
    """So many of the answers to each prompt, those with the highest scores; none: all."""
    threshold: float | None = None
    """Those that score more than this; none: whatever they score."""
    round_share: float = 1.0
    """Of what is left, this share over all prompts, those with the highest scores."""

    def __post_init__(self) -> None:
        if self.best is not None and (isinstance(self.best, bool) or self.best != int(self.best) or self.best < 1):
            raise ConfigError(f"settings.best={self.best} must be a whole number, 1 or more, or null for all")
        if self.round_share is None or not 0 < self.round_share <= 1:
            raise ConfigError(f"settings.round_share={self.round_share} must be above 0 and at most 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"settings.threshold={self.threshold} must be a finite number, or null for none")

    def most(self, prompts: int, answers: int) -> int:
        """How many of so many `answers` to each of so many `prompts` can be kept."""
        return _share(prompts * min(self.best or answers, answers), self.round_share)


# --- best of n --------------------------------------------------------------------------------------------------------


def best_of_n_kl(n: int) -> float:
    """How far taking the best of n answers moves a policy, in nats an answer: ln n - (n - 1) / n.

    Stiennon et al. 2020, app. G.3. It is the KL itself where every answer is rare and no two score alike, and no less
    than it anywhere else (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def expected_best(scores: Tensor, k: int) -> Tensor:
    """What the best of k answers scores on average, from n >= k answers to each prompt: scores [..., n] -> [...].

    The mean over all subsets of k, hence unbiased (Nakano et al. 2021 estimate best of k so): in ascending order answer
    i is the best of C(i - 1, k - 1) of the C(n, k) subsets. k = 1: the mean.
    """
    n = scores.shape[-1]
    assert 1 <= k <= n, f"the best of {k} cannot be known from {n} answers"
    weights = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return (scores.double().sort(-1).values * torch.tensor(weights, dtype=torch.float64)).sum(-1).to(scores.dtype)


def best_of_groups(scores: PerSequence, group: Ints, count: int = 1) -> Mask:
    """True [B] for the `count` highest scores of every group; of equal ones the earlier counts as higher."""
    order = scores.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = group[order].unique_consecutive(return_counts=True)[1]
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return torch.zeros_like(group, dtype=torch.bool).index_put((order,), place < count)


# --- what is learnt from a round's answers ----------------------------------------------------------------------------


def kept_answers(scores: PerSequence, group: Ints, settings: SelectionSettings) -> Mask:
    """True [B] for the answers that are imitated.

    `best` is RAFT (Dong et al. 2023, alg. 1), `threshold` the filter of ReST (Gulcehre et al. 2023, sec. 3).
    """
    kept = torch.ones_like(group, dtype=torch.bool)
    if settings.best is not None:
        kept &= best_of_groups(scores, group, settings.best)
    if settings.threshold is not None:
        kept &= scores > settings.threshold
    rows = kept.nonzero()[:, 0]
    kept[rows] = best_of_groups(scores[rows], torch.zeros_like(rows), _share(len(rows), settings.round_share))
    return kept


def imitated(experience: Experience, scores: PerSequence, settings: SelectionSettings, seed: int) -> SupervisedBatch:
    """The answers that `kept_answers` keeps, as demonstrations. Those left out of the loss are no candidates."""
    rows = experience.response_mask.any(-1).nonzero()[:, 0]
    rows = rows[kept_answers(scores[rows], experience.group[rows], settings)]
    return SupervisedBatch(experience.tokens[rows], experience.attention_mask[rows], experience.response_mask[rows])


def ranked(experience: Experience, scores: PerSequence, settings: OnlineDpoSettings, seed: int) -> PreferenceBatch:
    """Answers ranked by their scores, the best against the worst of each group or all against all (Guo et al. 2024).

    With `label_noise` s, i beats j with probability sigmoid((score_i - score_j) / s), as Bradley and Terry have it:
    numbers from Gumbel's distribution are added, whose difference is logistic. Answers that are in no pair, and those
    left out of the loss, are left out.
    """
    assert experience.ref_logprobs is not None, "DPO needs a reference"
    rows = experience.response_mask.any(-1).nonzero()[:, 0]
    scores, group = scores[rows].double(), experience.group[rows]
    if settings.label_noise:
        uniform = torch.rand(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        scores = scores - settings.label_noise * (-uniform.log()).log()
    if not settings.all_pairs:
        ends = best_of_groups(scores, group) | best_of_groups(-scores, group)
        rows, scores, group = rows[ends], scores[ends], group[ends]
    rank = ((group[None, :] == group[:, None]) & (scores[None, :] > scores[:, None])).sum(-1)
    paired = torch.cat(ranking_pairs(group, rank)).unique()
    rows = rows[paired]
    mask = experience.response_mask[rows]
    return PreferenceBatch(
        tokens=experience.tokens[rows],
        attention_mask=experience.attention_mask[rows],
        response_mask=mask,
        last=experience.attention_mask[rows].sum(-1) - 1,
        group=group[paired],
        rank=rank[paired],
        ref_answer_logprobs=summed_over_answers(experience.ref_logprobs[rows], mask),
    )


def _share(count: int, share: float) -> int:
    # 0.07 x 100 is 7.000000000000001, which is not eight answers.
    return math.ceil(round(count * share, 6))
