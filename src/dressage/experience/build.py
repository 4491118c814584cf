"""Rollouts and rewards become Experience: the per-token reward, advantages and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dressage.algorithms.advantages import Advantage, actor_critic
from dressage.algorithms.kl import k1
from dressage.batches import Experience, Ints, Mask, PerSequence, PerToken, Samples
from dressage.schema import Rollout
from dressage.tensors import group_mean, masked_mean, masked_var, pad_right, whiten


@dataclass(frozen=True, kw_only=True)
class ExperienceReport:
    """What a round's answers earned, over all of them: those left out of the loss count here."""

    score_mean: float
    """Of the scores as given."""
    score_std: float
    score_clipped_share: float
    """Answers whose score met the clip."""
    length_correlation: float
    """Of scores and answers' lengths; 0 where either is the same for all."""
    totals: PerSequence  # [B]
    """Of each answer: score after clip and penalty, less the price of the KL. What is maximised."""
    kl_per_answer: float
    """Nats against the reference, summed over an answer's tokens; 0 without a reference."""
    finished_share: float
    mean_tokens: float
    """Length of an answer, its end mark included."""
    explained_variance: float
    """Share of the returns' variance that the values knew; 0 without values."""
    engine_max_difference: float
    """Largest difference of a log-probability between engine and policy."""


def tensors_of(rollouts: Sequence[Rollout], pad_token: int) -> Samples:
    """Rollouts, whose prompts are encoded, as tensors."""
    rows = [(rollout.prompt.tokens, rollout.completion) for rollout in rollouts]
    lengths = [(len(prompt), len(answer.tokens)) for prompt, answer in rows]
    return Samples(
        tokens=pad_right([[*prompt, *answer.tokens] for prompt, answer in rows], int(pad_token)),
        attention_mask=pad_right([[True] * (before + after) for before, after in lengths], False),
        response_mask=pad_right([[False] * before + [True] * after for before, after in lengths], False),
        engine_logprobs=pad_right([[0.0] * len(prompt) + list(answer.logprobs) for prompt, answer in rows], 0.0),
        group=torch.tensor([rollout.group for rollout in rollouts], dtype=torch.int64),
        finished=torch.tensor([answer.finish == "stop" for _, answer in rows], dtype=torch.bool),
    )


Truncated = Literal["keep", "penalty", "soft", "mask"]


def earned(
    scores: PerSequence,
    finished: Mask,
    length: Tensor,
    *,
    truncated: Truncated = "keep",
    truncation_penalty: float = 0.0,
    score_clip: float | None = None,
    soft_tokens: int = 0,
    max_length: int = 0,
) -> PerSequence:
    """Scores [B] clipped to +-score_clip, less what being too long costs; the KL comes later.

    "penalty": an answer that was cut loses `truncation_penalty`. "soft": the more of it the further an answer of
    `length` [B] reaches into the last `soft_tokens` before `max_length` (Yu et al. 2025, eq. 13).
    """
    kept = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    match truncated:
        case "penalty":
            return kept - truncation_penalty * ~finished
        case "soft":
            into = (length - (max_length - soft_tokens)) / soft_tokens
            return kept - truncation_penalty * into.clamp(0.0, 1.0)
        case _:
            return kept


def unlike(scores: PerSequence, group: Ints) -> Mask:
    """True for answers [B] of groups that do not all score the same: only those can be compared."""
    return group_mean((scores - group_mean(scores, group)).square(), group) > 0


@torch.no_grad()
def build_experience(
    samples: Samples,
    scores: PerSequence,
    old_logprobs: PerToken,
    ref_logprobs: PerToken | None,
    values: PerToken | None,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_advantages: bool,
    token_kl: PerToken | None = None,
    advantage: Advantage | None = actor_critic,
    baseline: PerSequence | None = None,
    truncated: Truncated = "keep",
    truncation_penalty: float = 0.0,
    score_clip: float | None = None,
    soft_tokens: int = 0,
    max_length: int = 0,
) -> tuple[Experience, ExperienceReport]:
    """Experience of answers with these scores [B], and what they earned.

    A token's reward is -kl_coef (old - reference log-probability), the last token's also the answer's score (Ziegler et
    al. 2019, eq. 2); `token_kl` [B, T], if given, is priced in place of that difference. The score is clipped first,
    and pays for being too long, as `earned` says; or answers the engine cut are left out of the loss. A `baseline` [B]
    is taken off every advantage of its answer. Returns come before the advantages are whitened. Without `advantage`
    nothing is weighed, and all are 0.
    """
    answer = samples.response_mask
    old_logprobs = old_logprobs.masked_fill(~answer, 0.0)
    if ref_logprobs is None:
        assert kl_coef == 0, "a price on KL needs a reference"
        kl = torch.zeros_like(old_logprobs)
    else:
        ref_logprobs = ref_logprobs.masked_fill(~answer, 0.0)
        kl = k1(old_logprobs, ref_logprobs)
    scores = scores.to(old_logprobs)
    clipped_share = torch.zeros(()) if score_clip is None else (scores.abs() > score_clip).float().mean()
    kept = earned(
        scores,
        samples.finished,
        answer.sum(-1),
        truncated=truncated,
        truncation_penalty=truncation_penalty,
        score_clip=score_clip,
        soft_tokens=soft_tokens,
        max_length=max_length,
    )
    counted = answer & samples.finished[:, None] if truncated == "mask" else answer

    priced = kl if token_kl is None else token_kl.masked_fill(~answer, 0.0)
    rewards = -kl_coef * priced + kept[:, None] * _last(answer)
    advantages = torch.zeros_like(rewards)
    if advantage is not None:
        advantages = advantage(rewards, values, counted, samples.group, gamma=gamma, lam=lam)
    if baseline is not None:
        advantages = advantages - baseline.to(advantages)[:, None] * counted
    returns = None
    if values is not None:
        values = values.masked_fill(~answer, 0.0)
        returns = (advantages + values).masked_fill(~counted, 0.0)
    if whiten_advantages:
        advantages = whiten(advantages, counted)

    experience = Experience(
        tokens=samples.tokens,
        attention_mask=samples.attention_mask,
        response_mask=counted,
        engine_logprobs=samples.engine_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        group=samples.group,
        ref_logprobs=ref_logprobs,
        values=values,
        returns=returns,
    )
    report = ExperienceReport(
        score_mean=scores.mean().item(),
        score_std=scores.std(correction=0).item(),
        score_clipped_share=clipped_share.item(),
        length_correlation=_correlation(scores, answer.sum(-1)),
        totals=rewards.sum(-1),
        kl_per_answer=kl.sum(-1).mean().item(),
        finished_share=samples.finished.float().mean().item(),
        mean_tokens=answer.sum(-1).float().mean().item(),
        explained_variance=_explained_variance(values, returns, counted),
        engine_max_difference=(samples.engine_logprobs - old_logprobs)[answer].abs().amax().item(),
    )
    return experience, report


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, over [B]."""
    pair = torch.stack([one.double(), other.double()])
    pair = pair - pair.mean(-1, keepdim=True)
    size = pair.square().sum(-1).prod().sqrt()
    return (pair.prod(0).sum() / size).item() if size > 0 else 0.0


def _last(mask: Mask) -> Mask:
    """True on the last token that counts of every row."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def _explained_variance(values: PerToken | None, returns: PerToken | None, mask: Mask) -> float:
    if values is None or returns is None:
        return 0.0
    variance = masked_var(returns, mask)
    left = masked_mean((returns - values).square(), mask)
    return (1 - left / variance).item() if variance > 0 else 0.0
