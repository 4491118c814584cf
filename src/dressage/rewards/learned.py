"""Rollouts to rewards by learned reward models, one or several."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dressage.batches import Ints, PerSequence
from dressage.data.order import length_sorted_chunks
from dressage.data.template import ChatTemplate
from dressage.models.reading import reads_trees
from dressage.models.roles import Role
from dressage.models.scoring import score_sequences
from dressage.schema import Reward, Rollout
from dressage.tensors import pad_right

SCORING_TOKENS = 2048
"""Padded tokens scored at once; no activations are kept."""


class Scorer(Protocol):
    """Something that says how good answers are."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        """One reward for each rollout, in order."""
        ...


@dataclass(frozen=True)
class LearnedReward:
    """A reward model reading answers at their last real token."""

    role: Role
    template: ChatTemplate | None = None
    """The reward model's own, where it is not the policy's: answers are then written anew for it."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        """The model's normalised score is the whole reward."""
        return [Reward(score, {"model": score}) for score in self.grade(rollouts)]

    def grade(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The model's normalised score of each answer."""
        rows, prompts = [self._tokens(rollout) for rollout in rollouts], [rollout.prompt.tokens for rollout in rollouts]
        scores: list[float] = score_rows(self.role, rows, beside=prompts).tolist()
        return scores

    def _tokens(self, rollout: Rollout) -> Sequence[int]:
        if self.template is None:
            return (*rollout.prompt.tokens, *rollout.completion.tokens)
        finished = rollout.completion.finish == "stop"
        return self.template.encode_answer(rollout.prompt, rollout.text, finished).tokens


def pessimistic(members: Sequence[LearnedReward], uncertainty_coef: float, rollouts: Sequence[Rollout]) -> list[float]:
    """Mean of the members' scores less `uncertainty_coef` times their population deviation.

    Where members disagree an answer is unlike what they learnt from (after Coste et al. 2023, who price the variance).
    """
    scores = torch.tensor([member.grade(rollouts) for member in members], dtype=torch.float64)
    prudent: list[float] = (scores.mean(0) - uncertainty_coef * scores.std(0, correction=0)).tolist()
    return prudent


@torch.no_grad()
def score_rows(role: Role, rows: Sequence[Sequence[int]], beside: Sequence[Hashable] | None = None) -> PerSequence:
    """Scores [N] of token rows, each read at its last token; how rows are batched changes nothing.

    Rows equal in `beside` begin alike, and are read together where that saves work.
    """
    lengths = [len(row) for row in rows]
    scores = torch.zeros(len(rows))
    device = role.backbone.device
    for chunk in length_sorted_chunks(lengths, SCORING_TOKENS, beside=beside if reads_trees(role.backbone) else None):
        tokens: Ints = pad_right([rows[i] for i in chunk], 0).to(device)
        last = torch.tensor([lengths[i] - 1 for i in chunk], device=device)
        mask = torch.arange(tokens.shape[1], device=device) <= last[:, None]
        scores[chunk] = score_sequences(role, tokens, mask, last).float().cpu()
    return scores
