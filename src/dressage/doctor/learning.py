"""Checks of how it is learnt: what must stay stays, advantages are right, neither cuts nor pauses change a thing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dressage import assemble
from dressage.algorithms import advantages
from dressage.algorithms.catalog import algorithm
from dressage.algorithms.policy_gradient import PolicyGradientSettings
from dressage.config import DataConfig, OptimizerConfig, SftConfig, TrainingConfig
from dressage.data.collate import collate_demonstrations
from dressage.doctor.check import Check, Finding, at_most, found
from dressage.doctor.subject import Subject, unchanged, without_head
from dressage.experience.build import build_experience, earned, tensors_of
from dressage.models.files import weights_hash
from dressage.models.roles import Role
from dressage.monitor.writers import Monitor
from dressage.schema import Completion, Prompt, Rollout
from dressage.training.batch_sources import DatasetSource, logprobs_of
from dressage.training.trainer import train
from dressage.training.update import WORST, Learner

RATE = 1e-3
"""Learning rate of a trial: enough to see a change."""
CLOSE = 1e-5


def rate_of_zero(subject: Subject) -> Finding:
    """15: two updates at learning rate 0 leave the ratio at 1, the KL at 0 and every bit of the weights."""
    with _learner(subject, 0.0) as learner:
        before = weights_hash(learner.policy.parameters())
        measured = [learner.update([subject.experience]) for _ in range(2)]
        same = weights_hash(learner.policy.parameters()) == before
    ratio, kl = (max(abs(one[name]) for one in measured) for name in (WORST, "kl/update_approx"))
    well = same and ratio <= subject.tolerance and kl <= subject.tolerance
    weights = "weights bit-equal" if same else "WEIGHTS MOVED"
    return found(well, f"ratio off 1 by {ratio:.1e}, KL {kl:.1e}, {weights}")


def reference_stands_still(subject: Subject) -> Finding:
    """16: an update moves the policy, and not a bit of the reference."""
    with _learner(subject, RATE) as learner:
        own = set(map(id, learner.policy.parameters().values()))

        def hashes() -> tuple[str, str]:
            named = subject.reference.backbone.model.named_parameters()
            others = {name: p for name, p in named if id(p) not in own}
            return weights_hash(learner.policy.parameters()), weights_hash(others)

        before, said = hashes(), logprobs_of(subject.reference, subject.samples, 1.0)
        learner.update([subject.experience])
        after, again = hashes(), logprobs_of(subject.reference, subject.samples, 1.0)
    kept = before[1] == after[1] and torch.equal(said, again)
    evidence = f"reference {before[1][:8]} -> {after[1][:8]}, policy {before[0][:8]} -> {after[0][:8]}"
    return found(kept and before[0] != after[0], evidence)


def advantages_are_right(subject: Subject) -> Finding:
    """23: generalised advantages are the sums of their definition, token by token."""
    settings = subject.row.settings
    assert isinstance(settings, PolicyGradientSettings)
    generator = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    # An answer, one with tokens in between that the policy did not choose, and one padded on both sides.
    chosen = [[2, 3, 4, 5, 6], [0, 1, 4, 5], [1, 2, 3]]
    mask = torch.tensor([[t in row for t in range(7)] for row in chosen])
    worst = 0.0
    for gamma, lam in ((settings.gamma, settings.lam), (0.9, 0.8)):
        got = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam)
        worst = max(worst, float((got - _by_definition(rewards, values, chosen, gamma, lam)).abs().max()))
    return at_most(worst, CLOSE, "GAE and its definition")


def _by_definition(rewards: Tensor, values: Tensor, chosen: list[list[int]], gamma: float, lam: float) -> Tensor:
    """sum over l of (gamma lam)^l times the surprise l tokens later (Schulman et al. 2016, eq. 16)."""
    result = torch.zeros_like(values)
    for row, places in enumerate(chosen):
        reward, value = ([float(field[row, t]) for t in places] for field in (rewards, values))
        after = [*value[1:], 0.0]
        surprise = [r + gamma * later - v for r, later, v in zip(reward, after, value, strict=True)]
        for i, t in enumerate(places):
            result[row, t] = sum((gamma * lam) ** (k - i) * surprise[k] for k in range(i, len(places)))
    return result


def ends_are_told_apart(subject: Subject) -> Finding:
    """24: why an answer ended is what the engine saw: an end mark as the last token allowed is an end, not a cut."""
    stops, sampled = subject.template.stop_tokens, [rollout.completion for rollout in subject.rollouts]
    wrong = sum((answer.tokens[-1] in stops) != (answer.finish == "stop") for answer in sampled)
    wrong += sum(token in stops for answer in sampled for token in answer.tokens[:-1])
    wrong += int((subject.samples.finished != torch.tensor([a.finish == "stop" for a in sampled])).sum())
    # The same first tokens, one of which now ends its answer, just at the limit.
    end = {sampled[0].tokens[0]}
    for rollout in subject.sample(subject.ppo.rollout.temperature, tokens=1, stops=end):
        wrong += (rollout.completion.tokens[0] in end) != (rollout.completion.finish == "stop")
    # By hand, since a model may end no answer at all, or all.
    pair = [Completion((1, 2), (0.0, 0.0), "stop"), Completion((1, 2), (0.0, 0.0), "length")]
    made = tensors_of([Rollout(Prompt((), (3,)), one, "", 0) for one in pair], subject.template.pad_token)
    scores, length = torch.zeros(2), torch.tensor([2, 2])
    price = earned(scores, made.finished, length, truncated="penalty", truncation_penalty=1.0)
    wrong += int(made.finished.tolist() != [True, False]) + int(price.tolist() != [0.0, -1.0])
    ended = sum(answer.finish == "stop" for answer in sampled)
    return found(wrong == 0, f"{ended} of {len(sampled)} answers ended, the others were cut; {wrong} told wrongly")


def whitening_sees_the_mask(subject: Subject) -> Finding:
    """25: advantages have mean 0 and deviation 1 over the tokens that count, however much padding there is."""
    lengths = (2, 5, 9)
    rollouts = [
        Rollout(Prompt((), (1, 1, 1)), Completion((2,) * n, (0.0,) * n, "stop"), "", i) for i, n in enumerate(lengths)
    ]
    samples = tensors_of(rollouts, subject.template.pad_token)
    noise = torch.randn(samples.tokens.shape, generator=torch.Generator().manual_seed(1))
    built, _ = build_experience(
        samples, torch.tensor([1.0, -2.0, 4.0]), torch.zeros_like(noise), None, noise,
        kl_coef=0.0, gamma=1.0, lam=0.95, whiten_advantages=True,
    )  # fmt: skip
    counted = [float(a) for row, n in zip(built.advantages, lengths, strict=True) for a in row[3 : 3 + n]]
    mean = sum(counted) / len(counted)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in counted) / len(counted))
    outside = float(built.advantages.abs().sum()) - sum(map(abs, counted))
    well = abs(mean) < CLOSE and abs(deviation - 1) < 1e-4 and abs(outside) < CLOSE * len(counted)
    return found(well, f"mean {mean:.1e}, deviation {deviation:.5f} over {len(counted)} tokens, {outside:.1e} outside")


def cutting_changes_nothing(subject: Subject) -> Finding:
    """26: the gradient of texts at once is that of as many micro-batches of one."""
    batch = collate_demonstrations(subject.rows, subject.template.pad_token)
    gradients = []
    for tokens in (10**6, 1):
        with _learner(subject, 0.0, "sft", tokens) as learner:
            gradients.append(_gradient_of(learner, batch))
    whole, cut = gradients
    size = float(whole.abs().max())
    worst = float((whole - cut).abs().max()) / size if size > 0 else math.nan
    # Sums of another order: a little more than rounding, relative to the largest.
    count = len(subject.rows)
    return at_most(worst, 10 * subject.tolerance, f"gradients of 1 x {count} and {count} x 1, relative to the largest,")


def _gradient_of(learner: Learner, batch: Any) -> Tensor:
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda parameter: kept.__setitem__(name, parameter.grad.detach().float().flatten().clone())

    hooks = [p.register_post_accumulate_grad_hook(keep(name)) for name, p in learner.policy.parameters().items()]
    try:
        learner.update([batch])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([kept[name] for name in sorted(kept)])


def resumed_is_uninterrupted(subject: Subject) -> Finding:
    """27: two steps are one step, a checkpoint, and one step more by somebody who had lost all weights and moments."""

    def learnt(folder: Path, steps: int, lose: bool = False) -> str:
        with _learner(subject, RATE, "sft", restore=False) as learner:
            if lose:
                with torch.no_grad():
                    for parameter in learner.policy.parameters().values():
                        parameter.fill_(0.1)
            pad = subject.template.pad_token
            train(
                DatasetSource(subject.rows[-2:], lambda rows: collate_demonstrations(rows, pad), 1, 1),
                learner,
                folder=folder,
                total_steps=steps,
                config=TrainingConfig(keep_checkpoints=1),
                seed=1,
                settings_hash="doctor",
                open_monitor=lambda start, before: Monitor(
                    folder, stage="sft", total_steps=steps, console=None, tensorboard=False, start_step=start
                ),
            )
            return weights_hash(learner.policy.parameters())

    role = without_head(subject.policy)
    with torch.random.fork_rng(), unchanged(role):
        with unchanged(role):
            whole = learnt(subject.scratch / "whole", 2)
        first = learnt(subject.scratch / "cut", 1)
        resumed = learnt(subject.scratch / "cut", 2, lose=True)
    return found(whole == resumed != first, f"uninterrupted {whole[:8]}, resumed {resumed[:8]}")


@contextmanager
def _learner(
    subject: Subject, rate: float, row: str | None = None, micro_batch_tokens: int | None = None, restore: bool = True
) -> Iterator[Learner]:
    """The policy as it would learn, by the run's own optimizer but for rate and warm-up; afterwards as it was."""
    optimizer: OptimizerConfig = subject.main.optimizer.model_copy(
        update={"learning_rate": rate, "warmup_steps": 0, "schedule": "constant"}
    )
    training = subject.main.training
    if micro_batch_tokens is not None:
        training = training.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    changed = {"optimizer": optimizer, "training": training, "lora": subject.lora}
    policy: Role = subject.policy
    if row is None:
        value = subject.ppo.value.model_copy(update={"warmup_steps": 0})
        config: Any = subject.ppo.model_copy(update=changed | {"value": value})
        settings = subject.row.settings
        assert isinstance(settings, PolicyGradientSettings)
        whole = subject.reference if settings.full_kl else None
        learner = assemble.build_learner(subject.row, policy, config, 2, reference=whole)
    else:
        policy = replace(policy, head=None)
        config = SftConfig(data=DataConfig(sources=("none",))).model_copy(update=changed)
        learner = assemble.build_learner(algorithm(row), policy, config, 2)
    if not restore:
        yield learner
        return
    with unchanged(policy):
        yield learner


CHECKS = (
    Check(15, "a rate of 0 moves nothing", rate_of_zero, "optimizer.weight_decay=0, lora.dropout=0"),
    Check(16, "the reference stands still", reference_stands_still, "lora: an adapter, so that the base is frozen"),
    Check(
        23,
        "advantages are right",
        advantages_are_right,
        "algorithms/advantages.py; until then a method without a critic: algorithm=rloo",
        True,
    ),
    Check(24, "ended and cut are told apart", ends_are_told_apart, "rollout.engine=native"),
    Check(25, "whitening over the mask", whitening_sees_the_mask, "settings.whiten_advantages=false", True),
    Check(
        26,
        "cutting a batch changes nothing",
        cutting_changes_nothing,
        "training.micro_batch_tokens: as large as memory allows",
    ),
    Check(
        27,
        "resumed is uninterrupted",
        resumed_is_uninterrupted,
        "training.checkpoint_every=0: do not rely on checkpoints",
    ),
)
