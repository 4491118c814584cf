"""Encoded rows -> right-padded tensors. Lengths make the masks: padding may well have the id of an end mark."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dressage.batches import PreferenceBatch, RatingBatch, SupervisedBatch
from dressage.data.prepare import EncodedRanking, EncodedRating
from dressage.data.template import Encoded


def collate_demonstrations(rows: Sequence[Encoded], pad_token: int) -> SupervisedBatch:
    """B demonstrations as [B, T], T the longest's length."""
    return SupervisedBatch(*_padded(rows, pad_token))


def collate_rankings(rows: Sequence[EncodedRanking], pad_token: int) -> PreferenceBatch:
    """The N answers of all rankings as [N, T]; those of the i-th ranking are neighbours and have group i."""
    answers = [answer for ranking in rows for answer in ranking.answers]
    tokens, attention_mask, response_mask = _padded(answers, pad_token)
    return PreferenceBatch(
        tokens=tokens,
        attention_mask=attention_mask,
        response_mask=response_mask,
        last=torch.tensor([len(answer.tokens) - 1 for answer in answers]),
        group=torch.tensor([group for group, ranking in enumerate(rows) for _ in ranking.answers]),
        rank=torch.tensor([rank for ranking in rows for rank in ranking.ranks]),
        grade=_grades(rows),
        ref_answer_logprobs=_reference(rows),
    )


def collate_ratings(rows: Sequence[EncodedRating], pad_token: int) -> RatingBatch:
    """Each rated answer and its unrelated one, neighbours, as [N, T]."""
    tokens, attention_mask, response_mask = _padded([answer for row in rows for answer in row.answers], pad_token)
    return RatingBatch(
        tokens=tokens,
        attention_mask=attention_mask,
        response_mask=response_mask,
        rating=torch.tensor([rating for row in rows for rating in (1 if row.good else -1, 0)]),
        ref_answer_logprobs=_reference(rows),
    )


def _grades(rows: Sequence[EncodedRanking]) -> Tensor | None:
    """Of every answer [N], NaN where not said; None if nothing was said of any."""
    if not any(row.grades for row in rows):
        return None
    return torch.tensor([grade for row in rows for grade in row.grades or (math.nan,) * len(row.answers)])


def _reference(rows: Sequence[EncodedRanking] | Sequence[EncodedRating]) -> Tensor | None:
    """Of every answer [N]; None if the reference was not asked."""
    said = [logprob for row in rows for logprob in row.ref_answer_logprobs]
    return torch.tensor(said) if said else None


def _padded(rows: Sequence[Encoded], pad_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and loss mask, each [B, T]."""
    assert rows and all(row.tokens for row in rows), "no rows, or a row without tokens"
    shape = (len(rows), max(len(row.tokens) for row in rows))
    tokens = torch.full(shape, pad_token, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        length = len(row.tokens)
        tokens[index, :length] = torch.tensor(row.tokens)
        attention_mask[index, :length] = True
        loss_mask[index, :length] = torch.tensor(row.loss_mask)
    return tokens, attention_mask, loss_mask
