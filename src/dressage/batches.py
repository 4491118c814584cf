"""The tensor nouns. Position t of every [B, T] field speaks about token t; masks are True where a position counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

Ints = Tensor
Mask = Tensor
PerToken = Tensor
PerSequence = Tensor
Scalar = Tensor

Batch = TypeVar("Batch", bound="SupervisedBatch | PreferenceBatch | RatingBatch | Samples | Experience")


@dataclass(frozen=True)
class SupervisedBatch:
    """Demonstrations to imitate.

    Example, a prompt of two tokens, an answer of two and the end mark, padded to six:
        tokens          5  8  9  1  2  0
        attention_mask  x  x  x  x  x  -
        loss_mask       -  -  x  x  x  -
    """

    tokens: Ints  # [B, T]
    attention_mask: Mask  # [B, T] True on real tokens
    loss_mask: Mask  # [B, T] True on tokens to learn: answers and their end marks


@dataclass(frozen=True)
class PreferenceBatch:
    """Ranked answers: N rows, the K answers of one prompt share a `group`; a comparison is K = 2."""

    tokens: Ints  # [N, T] prompt and answer
    attention_mask: Mask  # [N, T] True on real tokens
    response_mask: Mask  # [N, T] True on the answer and its end mark
    last: Ints  # [N] index of the last real token: where a reward model reads its score
    group: Ints  # [N]
    rank: Ints  # [N] 0 is best, equal ranks are a tie
    ref_answer_logprobs: PerSequence | None = None  # [N] of each whole answer; None: no reference
    grade: PerSequence | None = None  # [N] how good it was found, higher is better, NaN: not said; None: of none said


@dataclass(frozen=True)
class RatingBatch:
    """Answers judged one by one, and unrelated ones, from which only the KL to the reference is estimated."""

    tokens: Ints  # [N, T] prompt and answer
    attention_mask: Mask  # [N, T] True on real tokens
    response_mask: Mask  # [N, T] True on the answer and its end mark
    rating: Ints  # [N] 1 is good, -1 bad, 0 unrelated: another prompt's answer
    ref_answer_logprobs: PerSequence | None = None  # [N] of each whole answer; None: no reference
    kl: PerSequence | None = None  # [N] the update's estimate, nats an answer, the same for all; None: not yet made


@dataclass(frozen=True)
class Samples:
    """Rollouts as tensors: B prompts with their answers, padded on the right to T."""

    tokens: Ints  # [B, T] prompt, answer, padding
    attention_mask: Mask  # [B, T] True on prompt and answer
    response_mask: Mask  # [B, T] True on the answer
    engine_logprobs: PerToken  # [B, T] 0 outside the answer
    group: Ints  # [B]
    finished: Mask  # [B] False: the engine cut the answer at its limit


@dataclass(frozen=True)
class Experience:
    """Sampled answers and all that an online update needs to know of them.

    Position t of every field speaks about token t: its log-probability given the tokens before it, the value of the
    state it was chosen in, its reward.

    Example, one answer of two tokens to a prompt of three, padded to six:
        tokens          5  8  2  9  1  0
        attention_mask  x  x  x  x  x  -
        response_mask   -  -  -  x  x  -
        advantages      0  0  0  a  a  0
    """

    tokens: Ints  # [B, T] prompt, answer, padding
    attention_mask: Mask  # [B, T] True on real tokens
    response_mask: Mask  # [B, T] True on tokens the policy chose (and that count)
    engine_logprobs: PerToken  # [B, T] as reported while sampling
    old_logprobs: PerToken  # [B, T] of the trained policy before its first update
    advantages: PerToken  # [B, T]
    group: Ints  # [B] answers to one prompt share a number
    ref_logprobs: PerToken | None = None  # [B, T] None: no reference
    values: PerToken | None = None  # [B, T] V(s_t) before the update; None: no value model
    returns: PerToken | None = None  # [B, T] targets of the value model


@dataclass(frozen=True)
class TokenScores:
    """What a model says of a batch's tokens, at the positions asked for; 0 elsewhere."""

    logprobs: PerToken  # [B, T] of token t given the tokens before it
    entropy: PerToken | None = None  # [B, T] of the distribution token t was drawn from, nats
    values: PerToken | None = None  # [B, T] V(s_t) of the state token t was chosen in; None: no value head asked
    full_kl: PerToken | None = None  # [B, T] from the reference's distribution of token t to this one, nats


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    changed = {name: change(value) for name, value in vars(batch).items() if value is not None}
    return replace(batch, **changed)  # type: ignore[arg-type]


def select(batch: Batch, rows: Tensor) -> Batch:
    """These rows of every field."""
    return _each(batch, lambda value: value[rows])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on another device."""
    return _each(batch, lambda value: value.to(device))


def trimmed(batch: Batch) -> Batch:
    """Without the columns on the right that are padding in every row."""
    width = int(batch.attention_mask.any(0).nonzero().amax()) + 1
    return _each(batch, lambda value: value[:, :width] if value.dim() == 2 else value)
