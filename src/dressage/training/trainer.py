"""The loop: draw batches, update, report, save; the same for supervised learning, reward models and PPO."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dressage.config import TrainingConfig
from dressage.errors import CheckpointError, HealthError
from dressage.monitor.memory import give_back_memory, rss_gb
from dressage.monitor.metrics import declared
from dressage.monitor.watch import Watch, told
from dressage.monitor.writers import Monitor, read_metrics
from dressage.training.checkpoint import Checkpoint, checkpoint_steps, forget, load_checkpoint, save_checkpoint
from dressage.training.update import STOPPED, WORST, AnyBatch, Learner, Sums

LAST_KL = "kl/update_last"
# Updates name the terms of any loss; an offline stage has but one, and the log calls it so.
NAMES = {"loss": "loss/train", "accuracy": "accuracy/train", "margin": "margin/train"}


@dataclass(frozen=True)
class Sample:
    """An answer to show."""

    prompt: str
    answer: str
    reward: float
    finish: str


@dataclass(frozen=True)
class Round:
    """What one step of the loop learns from: one or more optimizer updates, each of one or more batches."""

    updates: Sequence[Sequence[AnyBatch]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    settings: Mapping[str, float] = field(default_factory=dict)
    """Of the algorithm, that adapt from round to round."""


class BatchSource(Protocol):
    """Where batches come from: a data set, or the policy's own answers."""

    def draw(self, step: int) -> Round:
        """The batches of step `step` (from 0): a function of the step and the weights alone."""
        ...

    def learnt(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """What the updates of this step measured; returns what is to be logged beside it."""
        ...

    def state(self) -> Mapping[str, Any]:
        """What `draw` needs beside the step: plain values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        ...


def train(
    source: BatchSource,
    learner: Learner,
    *,
    folder: Path,
    total_steps: int,
    config: TrainingConfig,
    seed: int,
    settings_hash: str,
    open_monitor: Callable[[int, float], Monitor],
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    watch: Callable[[Sequence[Mapping[str, Any]]], Watch] | None = None,
) -> None:
    """Runs, or goes on with, a training run in `folder` up to `total_steps`.

    `open_monitor(start_step, seconds_before)` opens the run's log. An interrupted run continues from its newest
    checkpoint and gives the same weights and metrics as one that never stopped: all draws come from (seed, step).
    `watch` makes the judge of its numbers, from those of the attempts before. CheckpointError if the checkpoints in
    `folder` belong to other settings; HealthError if the run's numbers say that it should end.
    """
    give_back_memory()  # what loading took
    start, before = _resume(source, learner, folder, settings_hash, config.keep_checkpoints)
    began = time.perf_counter()
    with open_monitor(start, before) as monitor:
        if evaluate is not None and start == 0:
            monitor.log(0, evaluate())
        judge = None if watch is None else watch(read_metrics(folder))
        for step in range(start, total_steps):
            torch.manual_seed(_mix(seed, step))
            begun = time.perf_counter()
            round_ = source.draw(step)
            drawn = time.perf_counter()
            if learner.algorithm.afresh:
                learner.restart()
            learner.algorithm = learner.algorithm.with_settings(round_.settings)
            measured = _learn(learner, round_.updates)
            seconds = time.perf_counter() - drawn
            measured |= {
                "time/update_seconds": seconds,
                "memory/rss_gb": rss_gb(),
                "tokens_per_second": measured["tokens"] / (time.perf_counter() - begun),
            }
            measured |= round_.metrics
            measured |= source.learnt(step, measured)
            done = step + 1
            if evaluate is not None and (
                done == total_steps or (config.evaluate_every and done % config.evaluate_every == 0)
            ):
                measured |= evaluate()
            named = {NAMES.get(name, name): value for name, value in measured.items()}
            logged = {name: value for name, value in named.items() if declared(name)}
            monitor.log(done, logged)
            for sample in round_.samples:
                monitor.sample(done, sample.prompt, sample.answer, sample.reward, sample.finish)
            if done == total_steps or (config.checkpoint_every and done % config.checkpoint_every == 0):
                spent = before + time.perf_counter() - began
                state = {
                    "source": source.state(),
                    "seconds": spent,
                    "settings": settings_hash,
                    "updates": learner.updates,
                }
                monitor.to_disk()
                checkpoint = Checkpoint(done, learner.optimizer.weights(), learner.optimizer.moments(), state)
                save_checkpoint(folder, checkpoint, config.keep_checkpoints)
            if judge is not None and _alarmed(judge, done, logged, monitor, learner, folder):
                break


def _alarmed(
    judge: Watch, step: int, logged: Mapping[str, float], monitor: Monitor, learner: Learner, folder: Path
) -> bool:
    """Says what is wrong. True if training is to end with an earlier checkpoint's weights, which then are in place."""
    row = {name: value if math.isfinite(value) else None for name, value in logged.items()}
    worse, fatal = judge.see({"step": step, **row})
    for verdict in worse:
        monitor.warn(told(judge.stage, verdict))
    if fatal is None:
        return False
    steps = checkpoint_steps(folder)
    back = judge.best(steps) if judge.action == "rollback" else None
    checkpoint = None if back is None else load_checkpoint(folder, back)
    if checkpoint is None:
        left = f"the checkpoint of step {steps[-1]} is whole" if steps else "there is no checkpoint yet"
        raise HealthError(
            f"{told(judge.stage, fatal)}\nstopped after step {step}; {left}; health.on_alarm=warn goes on regardless"
        )
    learner.optimizer.restore(checkpoint.weights, checkpoint.moments)
    monitor.warn(f"{told(judge.stage, fatal)}; rolled back to step {back}")
    return True


def _learn(learner: Learner, updates: Sequence[Sequence[AnyBatch]]) -> dict[str, float]:
    """All updates of a round, up to one that finds the policy too far; the mean of each measure over them.

    The first ratio is that of the first update, LAST_KL what the last one found. A round that kept nothing has none.
    """
    if not updates:
        return {"tokens": 0.0}
    sums: list[Sums] = []
    for batches in updates:
        sums.append(learner.update(batches))
        if sums[-1].get(STOPPED):
            break
    # The schedule goes by rounds: updates left out count.
    learner.updates += len(updates) - len(sums)
    means = {name: _mean(sums, name) for one in sums for name in one}
    means["tokens"] = sum(one["tokens"] for one in sums)
    if WORST in sums[0]:
        means[WORST] = sums[0][WORST]
        means[LAST_KL] = sums[-1]["kl/update_approx"]
    if STOPPED in sums[0]:
        means["updates/made_share"] = sum(not one[STOPPED] for one in sums) / len(updates)
    return means


def _mean(sums: Sequence[Sums], name: str) -> float:
    values = [one[name] for one in sums if name in one]
    return sum(values) / len(values)


def _resume(source: BatchSource, learner: Learner, folder: Path, settings_hash: str, keep: int) -> tuple[int, float]:
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        return 0, 0.0
    if checkpoint.state["settings"] != settings_hash:
        raise CheckpointError(
            f"{folder}: holds checkpoints of a run with other settings; give another --out, or delete the folder"
        )
    if checkpoint.weights.keys() != learner.optimizer.weights().keys():
        raise CheckpointError(
            f"{folder}: its checkpoints hold other weights than those that learn here; was a library"
            " changed? Give another --out, or delete the folder"
        )
    # The attempt before may have been stopped while it forgot them.
    forget(folder, checkpoint.step, keep)
    learner.optimizer.restore(checkpoint.weights, checkpoint.moments)
    learner.updates = checkpoint.state["updates"]
    source.restore(checkpoint.state["source"])
    return checkpoint.step, float(checkpoint.state["seconds"])


def _mix(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 7_919 + 17) % 2**63
