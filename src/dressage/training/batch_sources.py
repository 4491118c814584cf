"""Where batches come from: a data set in a seeded order, or the policy's own answers, scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dressage.algorithms.catalog import Algorithm
from dressage.algorithms.kl import ESTIMATORS, band, proportional
from dressage.batches import (
    Experience,
    Mask,
    PerSequence,
    PerToken,
    PreferenceBatch,
    RatingBatch,
    Samples,
    SupervisedBatch,
    select,
)
from dressage.config import PpoConfig
from dressage.data.collate import collate_demonstrations
from dressage.data.order import batch_indices
from dressage.data.template import ChatTemplate, Encoded
from dressage.errors import EngineError
from dressage.experience.buffer import minibatches
from dressage.experience.build import ExperienceReport, build_experience, earned, tensors_of, unlike
from dressage.models.reading import new_trunk, reads_trees
from dressage.models.roles import Role
from dressage.models.scoring import score_tokens, score_values
from dressage.monitor.diversity import distinct
from dressage.monitor.memory import give_back_memory
from dressage.monitor.metrics import PART
from dressage.rewards.learned import Scorer
from dressage.rollout.engine import Engine
from dressage.schema import Prompt, Reward, Rollout, Sampling
from dressage.training.online import online_settings, ranked_answers, updates_of
from dressage.training.trainer import LAST_KL, Round, Sample
from dressage.training.update import AnyBatch, pieces

Row = TypeVar("Row")
OfflineBatch = SupervisedBatch | PreferenceBatch | RatingBatch
SCORING_TOKENS = 2048
"""Padded tokens scored at once without gradient: no activations are kept, so this is small beside a training pass."""
TRUNK_BYTES = 256 << 20
"""Kept at most of what the layers below every adapter make of a round's answers."""
SHOWN = 2
"""Answers a round that are shown."""
ALIKE = 1e-3
"""How far apart sampler and policy may be, in nats, where the sampler's log-probs are taken."""


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


@dataclass(frozen=True)
class Draw:
    """A round's answers with what they earned, and how they were come by."""

    rollouts: Sequence[Rollout]
    rewards: Sequence[Reward]
    seconds: float
    """Spent writing them."""
    written: int
    """Tokens written, those of answers that were not kept among them."""
    alike_share: float
    """Of the prompts asked, those whose answers all scored the same."""


@dataclass
class RolloutSource:
    """Samples answers with the policy as it is, scores them, and builds Experience, or selects and ranks them."""

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
    gold: Callable[[Rollout, Reward], float] | None = None
    """What is thought of an answer by a judge that nobody learns from."""
    kl_coef: float = field(init=False)
    old_kl_coef: float = field(init=False)
    kept: list[Encoded] = field(init=False, default_factory=list)
    """What was kept in all rounds so far, for a row that learns all of it."""

    def __post_init__(self) -> None:
        self.kl_coef = self.config.kl.coef
        self.old_kl_coef = online_settings(self.algorithm).old_kl_coef
        backbone = self.policy.backbone
        backbone.trunk = new_trunk(backbone, self.policy.adapter, TRUNK_BYTES)

    def draw(self, step: int) -> Round:
        """A round: sample, score, build, cut into minibatches."""
        config, began = self.config, time.perf_counter()
        if self.policy.backbone.trunk is not None:
            self.policy.backbone.trunk.forget()
        give_back_memory()
        drawn = self._draw(step)
        rollouts, rewards = drawn.rollouts, drawn.rewards
        samples = tensors_of(rollouts, self.template.pad_token)
        apart = self._apart(samples)
        old_logprobs, values, token_kl = self._own_scores(samples, sampled=apart is not None)
        ref_logprobs = logprobs_of(self.reference, samples, config.rollout.temperature)
        if token_kl is None:
            token_kl = ESTIMATORS[config.kl.estimator](old_logprobs, ref_logprobs)
        settings = online_settings(self.algorithm)
        experience, report = build_experience(
            samples,
            _totals(rewards),
            old_logprobs,
            ref_logprobs,
            values,
            kl_coef=self.kl_coef,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_advantages=settings.whiten_advantages,
            token_kl=token_kl,
            advantage=self.algorithm.advantage,
            baseline=self._greedy_scores(step, rollouts) if self.algorithm.greedy_baseline else None,
            **self._lengths_price,
        )
        metrics = (
            _measures(report)
            | _parts(rewards)
            | {
                "distinct/share": distinct(rollout.text for rollout in rollouts),
                "kl/coef": self.kl_coef,
                "time/rollout_seconds": drawn.seconds,
                "time/rollout_tokens_per_second": drawn.written / drawn.seconds,
                "time/score_seconds": time.perf_counter() - began - drawn.seconds,
            }
        )
        if apart is not None:
            metrics["engine/max_logprob_difference"] = apart
        if values is not None:
            metrics["value/explained_variance"] = report.explained_variance
        if config.rollout.answers_per_prompt > 1:
            metrics["groups/alike_share"] = drawn.alike_share
        batch: SupervisedBatch | PreferenceBatch | Experience = experience
        if self.algorithm.teach is not None:
            batch = self.algorithm.teach(experience, report.totals, self.algorithm.settings, self._seed(step))
            metrics["kept/share"] = len(batch.tokens) / len(rollouts)
        if self.algorithm.afresh:
            assert isinstance(batch, SupervisedBatch)
            self.kept += _rows_of(batch)
            batch = collate_demonstrations(self.kept, self.template.pad_token) if self.kept else batch
        adapted = {}
        if self.old_kl_coef:
            adapted["old_kl_coef"] = metrics["kl/old_coef"] = self.old_kl_coef
        if self.gold is not None:
            metrics["gold/mean"] = sum(map(self.gold, rollouts, rewards)) / len(rollouts)
        shown = [
            Sample(rollout.prompt.text, rollout.text, reward.total, rollout.completion.finish)
            for rollout, reward in zip(rollouts[:SHOWN], rewards, strict=False)
        ]
        give_back_memory()
        return Round(self._updates(batch, step), metrics, shown, adapted)

    def learnt(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Moves the prices of KL: by how far this round's answers were from the reference, and its last update gone."""
        answers = self.config.rollout.prompts_per_step * self.config.rollout.answers_per_prompt
        kl, config = metrics["kl/reference_per_answer"], self.config.kl
        match config.controller:
            case "proportional":
                self.kl_coef = proportional(self.kl_coef, kl, config.target_per_answer, config.horizon_answers, answers)
            case "band":
                self.kl_coef = band(self.kl_coef, kl, config.low_per_answer, config.high_per_answer, config.factor)
        # Who does not weigh answers measures no distance from who wrote them, and has no price on it.
        gone, old = metrics.get(LAST_KL, 0.0), self.config.old_kl
        match old.controller:
            case "proportional":
                self.old_kl_coef = proportional(
                    self.old_kl_coef, gone, old.target_per_token, old.horizon_answers, answers
                )
            case "band":
                self.old_kl_coef = band(self.old_kl_coef, gone, old.low_per_token, old.high_per_token, old.factor)
        self.engine.load_weights(step + 1)
        return {}

    def state(self) -> Mapping[str, Any]:
        """The KL controllers, and answers kept for later; others are sampled anew from (seed, step)."""
        kept = [[list(row.tokens), list(map(int, row.loss_mask))] for row in self.kept]
        return {"kl_coef": self.kl_coef, "old_kl_coef": self.old_kl_coef, "kept": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.kl_coef, self.old_kl_coef = float(state["kl_coef"]), float(state["old_kl_coef"])
        self.kept = [Encoded(tuple(tokens), tuple(map(bool, mask))) for tokens, mask in state["kept"]]

    def _draw(self, step: int) -> Draw:
        """The round's answers. With redraws: of prompts whose answers differ in score, if so many can be found."""
        tries = 1 + online_settings(self.algorithm).redraws
        wanted = self.config.rollout.prompts_per_step * self.config.rollout.answers_per_prompt
        kept: list[tuple[Rollout, Reward]] = []
        seconds, written, asked, alike = 0.0, 0, 0, 0
        for number in range(step * tries, (step + 1) * tries):
            began = time.perf_counter()
            rollouts = self._sample(number, first_group=asked // self.config.rollout.answers_per_prompt)
            seconds += time.perf_counter() - began
            written += sum(len(rollout.completion.tokens) for rollout in rollouts)
            scored = list(zip(rollouts, self.scorer.score(rollouts), strict=True))
            differ = unlike(self._earned(scored), torch.tensor([rollout.group for rollout in rollouts])).tolist()
            asked, alike = asked + len(scored), alike + differ.count(False)
            kept += [one for one, apart in zip(scored, differ, strict=True) if apart or tries == 1]
            if len(kept) >= wanted:
                break
        # If nothing differs anywhere there is nothing to learn, but there are answers to report.
        rows = kept[:wanted] or scored
        return Draw([rollout for rollout, _ in rows], [reward for _, reward in rows], seconds, written, alike / asked)

    def _sample(self, number: int, first_group: int) -> list[Rollout]:
        """Answers to the prompts of this draw, counted over the whole run."""
        rollout = self.config.rollout
        rows = batch_indices(len(self.prompts), rollout.prompts_per_step, number, self.config.seed)
        prompts = [(group, self.prompts[row]) for group, row in enumerate(rows, start=first_group)]
        asked = [one for one in prompts for _ in range(rollout.answers_per_prompt)]
        return self._answers(asked, number, rollout.temperature)

    def _answers(self, asked: Sequence[tuple[int, Prompt]], number: int, temperature: float) -> list[Rollout]:
        rollout = self.config.rollout
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=self._seed(number),
            length_range=rollout.length_range,
        )
        completions = self.engine.generate([prompt for _, prompt in asked], sampling)
        return [
            Rollout(prompt, completion, self.template.decode(completion.tokens), group)
            for (group, prompt), completion in zip(asked, completions, strict=True)
        ]

    def _greedy_scores(self, step: int, rollouts: Sequence[Rollout]) -> PerSequence:
        """For every answer [B] what the likeliest answer to its prompt earns (Li et al. 2024, eq. 5)."""
        prompts = {rollout.group: rollout.prompt for rollout in rollouts}
        likeliest = self._answers(list(prompts.items()), step, temperature=0.0)
        scores = self._earned(list(zip(likeliest, self.scorer.score(likeliest), strict=True))).tolist()
        of_group = dict(zip(prompts, scores, strict=True))
        return torch.tensor([of_group[rollout.group] for rollout in rollouts])

    def _earned(self, scored: Sequence[tuple[Rollout, Reward]]) -> PerSequence:
        completions = [rollout.completion for rollout, _ in scored]
        return earned(
            _totals([reward for _, reward in scored]),
            torch.tensor([completion.finish == "stop" for completion in completions]),
            torch.tensor([len(completion.tokens) for completion in completions]),
            **self._lengths_price,
        )

    @property
    def _lengths_price(self) -> dict[str, Any]:
        """How scores are clipped, and what being too long costs."""
        config = self.config
        return {
            "truncated": config.truncated,
            "truncation_penalty": config.truncation_penalty,
            "score_clip": config.score_clip,
            "soft_tokens": config.soft_tokens,
            "max_length": config.rollout.max_new_tokens,
        }

    def _own_scores(self, samples: Samples, sampled: bool) -> tuple[PerToken, PerToken | None, PerToken | None]:
        """The policy's log-probabilities before this round's first update, the values, and the full KL if priced.

        `sampled`: the sampler's log-probabilities are the policy's, which is then not read.
        """
        reference = self.reference if self.config.kl.estimator == "full" else None
        asked = ["logprobs", *(["values"] if self.policy.head else []), *(["full_kl"] if reference else [])]
        found: dict[str, PerToken] = {"logprobs": samples.engine_logprobs}
        if not sampled:

            def scores(*rows: Tensor) -> Tensor:
                told = score_tokens(
                    self.policy, *rows, temperature=self.config.rollout.temperature, reference=reference
                )
                return torch.stack([getattr(told, name) for name in asked], -1)

            found = dict(zip(asked, _in_pieces(self.policy, samples, scores, len(asked)).unbind(-1), strict=True))
        values = found.get("values")
        if self.value is not None:
            value = self.value
            values = _in_pieces(value, samples, lambda *rows: score_values(value, *rows))
        return found["logprobs"], values, found.get("full_kl")

    def _apart(self, samples: Samples) -> float | None:
        """How far sampler and policy are apart on one answer; none if the sampler's log-probs are not to be taken.

        They are not where the policy is read for something else anyway. EngineError if they must be, and are too far.
        All answers are compared when they are first learnt from (ratio/first_max_error).
        """
        reuse = self.config.rollout.reuse_engine_logprobs
        wide = self.policy.backbone.model.dtype == torch.float32
        if reuse is False or not (reuse or wide) or self.policy.head or self.config.kl.estimator == "full":
            return None
        shortest = select(samples, samples.attention_mask.sum(-1).argmin()[None])
        own = logprobs_of(self.policy, shortest, self.config.rollout.temperature)
        worst = float((own - shortest.engine_logprobs)[shortest.response_mask].abs().amax())
        if worst <= ALIKE:
            return worst
        if reuse:
            raise EngineError(
                f"rollout.reuse_engine_logprobs: the sampler's log-probs differ from the policy's by {worst:.1e}, above"
                f" {ALIKE:g}; set it to null or false (needed with bfloat16)"
            )
        return None

    def _updates(self, batch: SupervisedBatch | PreferenceBatch | Experience, step: int) -> list[list[AnyBatch]]:
        """Minibatches of rows; ranked answers to one prompt stay together. None where nothing was kept."""
        units, size = [[row] for row in range(len(batch.tokens))], self.config.minibatch_size
        if isinstance(batch, PreferenceBatch):
            units = [(batch.group == prompt).nonzero()[:, 0].tolist() for prompt in batch.group.unique()]
            size = size and size // ranked_answers(self.algorithm, self.config)
        order = minibatches(len(units), size or max(1, len(units)), self.config.reuse, self._seed(step))
        updates: list[list[AnyBatch]] = []
        per_round = updates_of(self.algorithm, self.config)
        for number, chosen in enumerate(order):
            rows = [row for unit in chosen for row in units[unit]]
            batches: list[AnyBatch] = [select(batch, torch.tensor(rows))]
            if self.ptx is not None:
                batches.append(self.ptx.batch(step * per_round + number))
            updates.append(batches)
        return updates

    def _seed(self, number: int) -> int:
        return self.config.seed * 1_000_003 + number


def _rows_of(batch: SupervisedBatch) -> list[Encoded]:
    fields = zip(batch.tokens, batch.loss_mask, batch.attention_mask, strict=True)
    return [Encoded(tuple(tokens[real].tolist()), tuple(mask[real].tolist())) for tokens, mask, real in fields]


def logprobs_of(role: Role, samples: Samples, temperature: float) -> PerToken:
    """Log-probabilities [B, T] of the answers' tokens by this role, without gradient."""
    return _in_pieces(role, samples, lambda *rows: score_tokens(role, *rows, temperature=temperature).logprobs)


def _in_pieces(role: Role, samples: Samples, score: Callable[[Tensor, Mask, Mask], Tensor], *kinds: int) -> Tensor:
    result = torch.zeros(*samples.tokens.shape, *kinds)
    with torch.no_grad():
        answers = samples if reads_trees(role.backbone) else None
        for rows in pieces(samples.attention_mask, SCORING_TOKENS, answers=answers):
            width = int(samples.attention_mask[rows].sum(-1).amax())
            fields = (samples.tokens, samples.attention_mask, samples.response_mask)
            tokens, mask, wanted = (field[rows, :width].to(role.backbone.device) for field in fields)
            result[rows, :width] = score(tokens, mask, wanted).float().cpu()
    return result


def _measures(report: ExperienceReport) -> dict[str, float]:
    return {
        "reward/score_mean": report.score_mean,
        "reward/score_std": report.score_std,
        "reward/total_mean": report.totals.mean().item(),
        "reward/clipped_share": report.score_clipped_share,
        "reward/length_correlation": report.length_correlation,
        "kl/reference_per_answer": report.kl_per_answer,
        "finished/share": report.finished_share,
        "length/mean_tokens": report.mean_tokens,
        "engine/max_logprob_difference": report.engine_max_difference,
    }


def _parts(rewards: Sequence[Reward]) -> dict[str, float]:
    """Each part's mean where there are several, and how many answers one could not grade."""
    means = {PART + name: fmean(reward.parts[name] for reward in rewards) for name in rewards[0].parts}
    failed = fmean(bool(reward.failed) for reward in rewards)
    return {"reward/failed_share": failed} | (means if len(means) > 1 else {})


def _totals(rewards: Sequence[Reward]) -> PerSequence:
    return torch.tensor([reward.total for reward in rewards])
