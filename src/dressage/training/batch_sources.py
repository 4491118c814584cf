"""Where batches come from: a data set in a seeded order, or the policy's own answers, scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dressage.algorithms.catalog import Algorithm
from dressage.algorithms.kl import band, proportional
from dressage.algorithms.policy_gradient import PolicyGradientSettings
from dressage.batches import Experience, Mask, PerToken, PreferenceBatch, RatingBatch, SupervisedBatch, select
from dressage.config import PpoConfig
from dressage.data.order import batch_indices
from dressage.data.template import ChatTemplate
from dressage.errors import EngineError
from dressage.experience.buffer import minibatches
from dressage.experience.build import ExperienceReport, Samples, build_experience, tensors_of
from dressage.models.roles import Role
from dressage.models.scoring import score_tokens, score_values
from dressage.monitor.diversity import distinct
from dressage.rewards.learned import Scorer
from dressage.rollout.engine import Engine
from dressage.schema import Prompt, Rollout, Sampling
from dressage.training.trainer import Round, Sample
from dressage.training.update import AnyBatch, pieces

Row = TypeVar("Row")
OfflineBatch = SupervisedBatch | PreferenceBatch | RatingBatch
SCORING_TOKENS = 2048
"""Padded tokens scored at once without gradient: no activations are kept, so this is small beside a training pass."""
SHOWN = 2
"""Answers a round that are shown."""


class DatasetSource(Generic[Row]):
    """One batch a step from a fixed set of rows, every epoch in a new order."""

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[Sequence[Row]], OfflineBatch],
        batch_size: int,
        seed: int,
    ) -> None:
        self.rows, self.collate, self.batch_size, self.seed = rows, collate, batch_size, seed

    def batch(self, step: int) -> OfflineBatch:
        """The batch of this step."""
        return self.collate([self.rows[i] for i in batch_indices(len(self.rows), self.batch_size, step, self.seed)])

    def draw(self, step: int) -> Round:
        """One update of one batch."""
        return Round([[self.batch(step)]])

    def learnt(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Nothing is adapted."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """The order is a function of the step."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


@dataclass
class RolloutSource:
    """Samples answers with the policy as it is, scores them, and builds Experience."""

    config: PpoConfig
    algorithm: Algorithm
    prompts: Sequence[Prompt]
    template: ChatTemplate
    engine: Engine
    scorer: Scorer
    policy: Role
    reference: Role
    value: Role | None
    ptx: DatasetSource[Any] | None = None
    gold: Callable[[Rollout], float] | None = None
    kl_coef: float = field(init=False)

    def __post_init__(self) -> None:
        self.kl_coef = self.config.kl.coef

    def draw(self, step: int) -> Round:
        """A round: sample, score, build, cut into minibatches."""
        config, began = self.config, time.perf_counter()
        rollouts = self._sample(step)
        sampled = time.perf_counter()
        rewards = self.scorer.score(rollouts)
        samples = tensors_of(rollouts, self.template.pad_token)
        old_logprobs, values = self._own_scores(samples, step)
        ref_logprobs = logprobs_of(self.reference, samples, config.rollout.temperature)
        settings = self.algorithm.settings
        assert isinstance(settings, PolicyGradientSettings) and self.algorithm.advantage is not None
        experience, report = build_experience(
            samples,
            torch.tensor([reward.total for reward in rewards]),
            old_logprobs,
            ref_logprobs,
            values,
            kl_coef=self.kl_coef,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_advantages=settings.whiten_advantages,
            advantage=self.algorithm.advantage,
            truncated=config.truncated,
            truncation_penalty=config.truncation_penalty,
            score_clip=config.score_clip,
        )
        metrics = _measures(report) | {
            "distinct/share": distinct(rollout.text for rollout in rollouts),
            "kl/coef": self.kl_coef,
            "time/rollout_seconds": sampled - began,
            "time/score_seconds": time.perf_counter() - sampled,
        }
        if self.gold is not None:
            metrics["gold/mean"] = sum(map(self.gold, rollouts)) / len(rollouts)
        shown = [
            Sample(rollout.prompt.text, rollout.text, reward.total, rollout.completion.finish)
            for rollout, reward in zip(rollouts[:SHOWN], rewards, strict=False)
        ]
        return Round(self._updates(experience, step), metrics, shown)

    def learnt(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Moves the price of KL by what this round's answers were away from the reference."""
        kl, config = metrics["kl/reference_per_answer"], self.config.kl
        answers = self.config.rollout.prompts_per_step * self.config.rollout.answers_per_prompt
        match config.controller:
            case "proportional":
                self.kl_coef = proportional(self.kl_coef, kl, config.target_per_answer, config.horizon_answers, answers)
            case "band":
                self.kl_coef = band(self.kl_coef, kl, config.low_per_answer, config.high_per_answer, config.factor)
        self.engine.load_weights(step + 1)
        return {}

    def state(self) -> Mapping[str, Any]:
        """The KL controller; answers are sampled anew from (seed, step)."""
        return {"kl_coef": self.kl_coef}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.kl_coef = float(state["kl_coef"])

    def _sample(self, step: int) -> list[Rollout]:
        rollout = self.config.rollout
        rows = batch_indices(len(self.prompts), rollout.prompts_per_step, step, self.config.seed)
        asked = [
            (group, self.prompts[row]) for group, row in enumerate(rows) for _ in range(rollout.answers_per_prompt)
        ]
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=self.config.seed * 1_000_003 + step,
        )
        completions = self.engine.generate([prompt for _, prompt in asked], sampling)
        return [
            Rollout(prompt, completion, self.template.decode(completion.tokens), group)
            for (group, prompt), completion in zip(asked, completions, strict=True)
        ]

    def _own_scores(self, samples: Samples, step: int) -> tuple[PerToken, PerToken | None]:
        """The policy's log-probabilities before this round's first update, and the values."""
        reuse = self.config.rollout.reuse_engine_logprobs
        temperature = self.config.rollout.temperature
        old, values = samples.engine_logprobs, None
        if self.policy.head is not None:

            def both(*rows: Tensor) -> Tensor:
                scores = score_tokens(self.policy, *rows, temperature=temperature)
                assert scores.values is not None
                return torch.stack((scores.logprobs, scores.values), -1)

            old, values = _in_pieces(self.policy, samples, both, 2).unbind(-1)
        elif not reuse or step == 0:
            old = logprobs_of(self.policy, samples, temperature)
        if reuse and (worst := float((old - samples.engine_logprobs)[samples.response_mask].abs().amax())) > 1e-3:
            raise EngineError(
                f"rollout.reuse_engine_logprobs: the sampler's log-probs differ from the policy's by {worst:.1e}, above"
                " 1e-3; set it to false (needed with bfloat16)"
            )
        if self.value is not None:
            value = self.value
            values = _in_pieces(value, samples, lambda *rows: score_values(value, *rows))
        return old, values

    def _updates(self, experience: Experience, step: int) -> list[list[AnyBatch]]:
        answers = len(experience.tokens)
        size = self.config.minibatch_size or answers
        order = minibatches(answers, size, self.config.reuse, self.config.seed * 1_000_003 + step)
        updates: list[list[AnyBatch]] = []
        per_round = self.config.reuse * (answers // size)
        for number, rows in enumerate(order):
            batches: list[AnyBatch] = [select(experience, torch.tensor(rows))]
            if self.ptx is not None:
                batches.append(self.ptx.batch(step * per_round + number))
            updates.append(batches)
        return updates


def logprobs_of(role: Role, samples: Samples, temperature: float) -> PerToken:
    """Log-probabilities [B, T] of the answers' tokens by this role, without gradient."""
    return _in_pieces(role, samples, lambda *rows: score_tokens(role, *rows, temperature=temperature).logprobs)


def _in_pieces(role: Role, samples: Samples, score: Callable[[Tensor, Mask, Mask], Tensor], *kinds: int) -> Tensor:
    result = torch.zeros(*samples.tokens.shape, *kinds)
    with torch.no_grad():
        for rows in pieces(samples.attention_mask, SCORING_TOKENS):
            width = int(samples.attention_mask[rows].sum(-1).amax())
            fields = (samples.tokens, samples.attention_mask, samples.response_mask)
            tokens, mask, wanted = (field[rows, :width].to(role.backbone.device) for field in fields)
            result[rows, :width] = score(tokens, mask, wanted).float().cpu()
    return result


def _measures(report: ExperienceReport) -> dict[str, float]:
    return {
        "reward/score_mean": report.score_mean,
        "reward/score_std": report.score_std,
        "reward/total_mean": report.total_mean,
        "kl/reference_per_answer": report.kl_per_answer,
        "finished/share": report.finished_share,
        "length/mean_tokens": report.mean_tokens,
        "value/explained_variance": report.explained_variance,
        "engine/max_logprob_difference": report.engine_max_difference,
    }
