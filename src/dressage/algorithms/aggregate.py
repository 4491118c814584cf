"""The only place that averages, and always by the size of the whole update: how it is cut changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dressage.batches import Ints, Mask, PerToken, Scalar
from dressage.tensors import group_size


@dataclass(frozen=True)
class Totals:
    """Size of one whole update, over every micro-batch and every rank."""

    tokens: float
    """Tokens that count."""
    sequences: float
    """Answers with at least one such token; of rankings, prompts with at least one pair."""
    max_length: int = 1
    """Longest answer the engine was allowed."""


Weigh = Callable[[Mask, Totals], PerToken]
"""How tokens share the loss: a weight for each, adding up to 1 over the whole update (constant_length: at most 1)."""


def count(masks: Iterable[Mask], max_length: int = 1) -> Totals:
    """The totals of an update on one rank from its masks; ranks add theirs up."""
    masks = list(masks)
    return Totals(
        tokens=float(sum(mask.sum() for mask in masks)),
        sequences=float(sum(mask.any(-1).sum() for mask in masks)),
        max_length=max_length,
    )


# An update in which nothing counts (every answer cut and left out) has a loss of 0, not 0 / 0: hence the max(…, 1).


def token_mean(mask: Mask, totals: Totals) -> PerToken:
    """Every token counts the same (most PPO, DAPO)."""
    return mask / max(totals.tokens, 1)


def sequence_mean(mask: Mask, totals: Totals) -> PerToken:
    """Every answer counts the same, however long it is (GRPO)."""
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / max(totals.sequences, 1)


def constant_length(mask: Mask, totals: Totals) -> PerToken:
    """Every token counts the same and length never divides out (Dr. GRPO)."""
    return mask / (max(totals.sequences, 1) * totals.max_length)


def aggregate(per_token: PerToken, mask: Mask, totals: Totals, weigh: Weigh = token_mean) -> Scalar:
    """This micro-batch's share of the loss; the shares of an update add up to its mean.

    Values may be of whole answers [N] instead of tokens, under token_mean: every answer then counts the same.
    """
    return (per_token.masked_fill(~mask, 0.0) * weigh(mask, totals)).sum()


def aggregate_pairs(per_pair: Tensor, prompt: Ints, totals: Totals) -> Scalar:
    """This micro-batch's share of a ranking loss: the mean over a prompt's pairs, then over the update's prompts.

    `prompt` [P] names the prompt of each pair. A prompt counts once, whether four or nine answers were ranked
    (Ouyang et al. 2022, eq. 1), so all its pairs must lie in one micro-batch.
    """
    return (per_pair / group_size(prompt)).sum() / max(totals.sequences, 1)


def rankings_total(groups: Iterable[Ints]) -> Totals:
    """The totals of an update of rankings from the prompts of its pairs, one tensor [P] for each micro-batch."""
    groups = list(groups)
    prompts = sum(len(torch.unique(prompt)) for prompt in groups)
    return Totals(tokens=float(sum(len(prompt) for prompt in groups)), sequences=float(prompts))
