"""Checks of a run as a whole: its reward, its groups, its arithmetic, and what it will take."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dressage import assemble, assemble_rewards
from dressage.algorithms.catalog import algorithm
from dressage.config import PpoConfig
from dressage.doctor.check import Check, Finding, does_not_apply, found
from dressage.doctor.subject import ANSWERS, Subject, without_head
from dressage.errors import DressageError
from dressage.monitor.metrics import METRICS
from dressage.schema import Completion, Prompt, Reward, Rollout, Sampling
from dressage.training.batch_sources import RolloutSource
from dressage.training.online import learnt_answers, online_algorithm
from dressage.training.preflight import Foresight

SLOW_SECONDS = 1.0
"""Of scoring one answer, from which on the reward is what the run waits for."""
ALIKE = "groups/alike_share"


def reward_is_sound(subject: Subject) -> Finding:
    """28: every answer gets a finite reward, soon, and the same one when asked again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What a part tells of its failures stands in `failed`.
        began = time.perf_counter()
        rewards = subject.scorer.score(subject.rollouts)
        seconds = (time.perf_counter() - began) / len(rewards)
        second = [reward.total for reward in subject.scorer.score(subject.rollouts)]
    first = [reward.total for reward in rewards]
    broken = sum(bool(reward.failed) or not math.isfinite(reward.total) for reward in rewards)
    moved = max((abs(a - b) for a, b in zip(first, second, strict=True)), default=0.0)
    evidence = f"{broken} of {len(first)} answers without a finite reward; {moved:.1e} apart when asked again"
    evidence += f"; {seconds:.3f} s each"
    if broken or not moved <= 1e-6 * max(1.0, *map(abs, first)):
        return Finding("fault", evidence)
    return found(seconds < SLOW_SECONDS, evidence, "warn")


@dataclass
class _Recorded:
    """An engine that gives the answers it was given."""

    answers: Sequence[Rollout]

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """What was sampled before, whatever is asked."""
        return [rollout.completion for rollout in self.answers]

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Nothing changes."""


@dataclass
class _HalfAlike:
    """Answers of the first group all earn the same, the others do not."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        """0, or the answer's place."""
        return [Reward(float(i * (rollout.group > 0))) for i, rollout in enumerate(rollouts)]


def equal_groups_are_reported(subject: Subject) -> Finding:
    """29: the share of prompts whose answers all score the same is measured, and logged."""
    if subject.online is None:
        return does_not_apply("nothing learns from its own answers")
    groups = len(subject.prompts)
    rollout = subject.ppo.rollout.model_copy(
        update={"prompts_per_step": groups, "answers_per_prompt": ANSWERS, "reuse_engine_logprobs": False}
    )
    policy = without_head(subject.policy)
    source = RolloutSource(
        config=subject.ppo.model_copy(update={"rollout": rollout, "minibatch_size": None, "score_clip": None}),
        algorithm=algorithm("rloo"),
        prompts=subject.prompts,
        template=subject.template,
        engine=_Recorded(subject.rollouts),
        scorer=_HalfAlike(),
        policy=policy,
        reference=subject.reference,
        value=None,
    )
    told = source.draw(0).metrics.get(ALIKE, math.nan)
    evidence = f"1 of {groups} groups made alike: {told:.2f} is told"
    return found(told == 1 / groups and ALIKE in METRICS, evidence)


def batches_divide(subject: Subject) -> Finding:
    """30: rounds fall into whole minibatches, and settings do not contradict each other, before weights are loaded."""
    told, level = [], "ok"
    for name, stage in subject.learning.items():
        if isinstance(stage, PpoConfig):
            try:
                answers = learnt_answers(online_algorithm(stage), stage)
            except DressageError as error:
                told.append(f"{name}: {error}")
                level = "fault"
                continue
            size = stage.minibatch_size or answers
            told.append(f"{name}: {answers} answers / {size} = {answers / size:g} updates")
            if answers % size:
                level = "fault"
            continue
        rows = next((text.read - len(text.left_out) for text in subject.texts if text.data == stage.data), None)
        size = stage.training.batch_size
        told.append(f"{name}: batches of {size}" + ("" if rows is None else f" from {rows} rows"))
        if rows is not None and rows < size and level == "ok":
            level = "warn"
    return Finding(level, "; ".join(told) or "nothing learns")  # type: ignore[arg-type]


def cost_is_known(subject: Subject) -> Finding:
    """31: what a run takes is told before it begins, and there is as much memory."""
    template = cache(assemble.build_template)
    read = cache(lambda kind, data, model, seed: assemble.build_rows(kind, data, template(model), seed))
    foresight = Foresight(read, assemble_rewards.check_rewards)
    for name, stage in subject.stages.items():
        foresight.of(stage, subject.folder / name)
    if not foresight.memory:
        return does_not_apply("nothing here takes weights")
    needed, there = max(foresight.memory), memory_bytes()
    minutes = sum(foresight.seconds) / 60
    evidence = f"about {minutes:.0f} minutes and {needed / 1e9:.1f} GB; {there / 1e9:.1f} GB are free"
    return found(0 < needed <= there, evidence, "warn")


def memory_bytes() -> float:
    """What is free for a run: on the GPU if there is one, else in RAM."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


CHECKS = (
    Check(
        28,
        "the reward is sound",
        reward_is_sound,
        "reward_model: another folder; rewards: put the function right, raise timeout_seconds",
    ),
    Check(
        29,
        "equal groups are reported",
        equal_groups_are_reported,
        "rollout.answers_per_prompt: more, or settings.redraws",
    ),
    Check(30, "batches divide", batches_divide, "minibatch_size, training.batch_size", True),
    Check(31, "the cost is known", cost_is_known, "training.micro_batch_tokens, lora.layers, rollout.max_batch: less"),
)
