"""Rollouts and rewards become Experience: the per-token reward, advantages and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dressage.algorithms.advantages import Advantage, actor_critic
from dressage.algorithms.kl import k1
from dressage.batches import Experience, Ints, Mask, PerSequence, PerToken
from dressage.schema import Rollout
from dressage.tensors import masked_mean, masked_var, pad_right, whiten


@dataclass(frozen=True)
class Samples:
    """Rollouts as tensors: B prompts with their answers, padded on the right to T."""

    tokens: Ints  # [B, T] prompt, answer, padding
    attention_mask: Mask  # [B, T] True on prompt and answer
    response_mask: Mask  # [B, T] True on the answer
    engine_logprobs: PerToken  # [B, T] 0 outside the answer
    group: Ints  # [B]
    finished: Mask  # [B] False: the engine cut the answer at its limit


@dataclass(frozen=True, kw_only=True)
class ExperienceReport:
    """What a round's answers earned, over all of them: those left out of the loss count here."""

    score_mean: float
    """Of the scores as given."""
    score_std: float
    score_clipped_share: float
    """Answers whose score met the clip."""
    total_mean: float
    """Score after clip and penalty, less the price of the KL: what is maximised."""
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
    advantage: Advantage = actor_critic,
    truncated: Literal["keep", "penalty", "mask"] = "keep",
    truncation_penalty: float = 0.0,
    score_clip: float | None = None,
) -> tuple[Experience, ExperienceReport]:
    """Experience of answers with these scores [B], and what they earned.

    A token's reward is -kl_coef (old - reference log-probability), the last token's also the answer's score (Ziegler et
    al. 2019, eq. 2). The score is clipped to +-score_clip first. Answers the engine cut are kept as they are, lose
    `truncation_penalty`, or are left out of the loss. Returns come before the advantages are whitened.
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
    earned = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    clipped_share = (earned != scores).float().mean()
    if truncated == "penalty":
        earned = earned - truncation_penalty * ~samples.finished
    counted = answer & samples.finished[:, None] if truncated == "mask" else answer

    rewards = -kl_coef * kl + earned[:, None] * _last(answer)
    advantages = advantage(rewards, values, counted, samples.group, gamma=gamma, lam=lam)
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
        total_mean=rewards.sum(-1).mean().item(),
        kl_per_answer=kl.sum(-1).mean().item(),
        finished_share=samples.finished.float().mean().item(),
        mean_tokens=answer.sum(-1).float().mean().item(),
        explained_variance=_explained_variance(values, returns, counted),
        engine_max_difference=(samples.engine_logprobs - old_logprobs)[answer].abs().amax().item(),
    )
    return experience, report


def _last(mask: Mask) -> Mask:
    """True on the last token that counts of every row."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def _explained_variance(values: PerToken | None, returns: PerToken | None, mask: Mask) -> float:
    if values is None or returns is None:
        return 0.0
    variance = masked_var(returns, mask)
    left = masked_mean((returns - values).square(), mask)
    return (1 - left / variance).item() if variance > 0 else 0.0
