"""The loop and the update: cutting changes nothing, an interrupted run is the uninterrupted one, saving is whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from dressage.algorithms.catalog import algorithm
from dressage.batches import Experience, PreferenceBatch, SupervisedBatch
from dressage.config import LoraConfig, OptimizerConfig, TrainingConfig
from dressage.errors import CheckpointError
from dressage.models.backbone import Backbone
from dressage.models.files import weights_hash
from dressage.models.roles import Role, ScalarHead
from dressage.models.scoring import score_tokens, score_values
from dressage.monitor.writers import Monitor, read_metrics
from dressage.training.batch_sources import DatasetSource
from dressage.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dressage.training.optimizer import Optimizer, learning_rate
from dressage.training.trainer import train
from dressage.training.update import Learner, pieces


def backbone() -> Backbone:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return Backbone(LlamaForCausalLM(config).eval())


def texts(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and response mask of texts of 5 to 12 tokens, the first three of which are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 13, (count,), generator=generator)
    mask = torch.arange(12) < lengths[:, None]
    tokens = torch.randint(0, 64, (count, 12), generator=generator).masked_fill(~mask, 0)
    return tokens, mask, mask & (torch.arange(12) >= 3)


def learner(name: str, micro_batch_tokens: int, *, rate: float = 1e-2, dropout: float = 0.0) -> Learner:
    """A learner of this row with an adapter, and a critic of its own for PPO."""
    base = backbone()
    base.add_adapter("policy", LoraConfig(rank=4, dropout=dropout), seed=2)
    head = ScalarHead.for_reward(32, seed=3) if name.startswith("reward") else None
    policy = Role(base, "policy", head)
    groups: dict[str, Mapping[str, Any]] = {"policy": policy.parameters()}
    value = None
    if name == "ppo":
        base.add_adapter("value", LoraConfig(rank=4), seed=4)
        value = Role(base, "value", ScalarHead(32))
        groups["value"] = value.parameters()
    config = OptimizerConfig(learning_rate=rate)
    return Learner(
        algorithm=algorithm(name),
        policy=policy,
        value=value,
        optimizer=Optimizer(groups, config),
        rates=lambda update: dict.fromkeys(groups, rate),
        micro_batch_tokens=micro_batch_tokens,
        max_length=12,
    )


def supervised(count: int = 8, seed: int = 0) -> SupervisedBatch:
    return SupervisedBatch(*texts(count, seed))


def preference(seed: int = 0) -> PreferenceBatch:
    """Three prompts with 4, 2 and 3 answers; the last has a tie."""
    tokens, mask, response = texts(9, seed)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    rank = torch.tensor([0, 1, 2, 3, 1, 0, 0, 1, 1])
    return PreferenceBatch(tokens, mask, response, mask.sum(-1) - 1, group, rank)


def experience(learns: Learner, seed: int = 0) -> Experience:
    """What the learner would have collected: its own log-probabilities and values, made-up advantages."""
    tokens, mask, response = texts(8, seed)
    generator = torch.Generator().manual_seed(seed)
    assert learns.value is not None
    with torch.no_grad():
        logprobs = score_tokens(learns.policy, tokens, mask, response).logprobs
        values = score_values(learns.value, tokens, mask, response)
    noise = torch.randn(8, 12, generator=generator).masked_fill(~response, 0.0)
    return Experience(
        tokens, mask, response, logprobs, logprobs, noise, torch.arange(8), logprobs, values, values + noise
    )


def gradients(learns: Learner, batches: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The gradient of one whole update, before any clipping or step."""
    for batch in batches:
        for _ in learns._learn(batch):
            pass
    return {name: p.grad.clone() for name, p in learns.optimizer.named.items() if p.grad is not None}


@pytest.mark.parametrize("name", ["sft", "reward_log_sig", "ppo"])
def test_micro_batches_change_nothing(name: str) -> None:
    """One piece, or pieces of a row or a ranking each: the same gradient, which is the mean over all."""
    found = []
    for tokens in (10_000, 1):
        learns = learner(name, tokens)
        batch = {"sft": supervised, "reward_log_sig": preference}.get(name, lambda learns=learns: experience(learns))()
        found.append(gradients(learns, [batch]))
    assert found[0].keys() == found[1].keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in found[0].values())
    for key in found[0]:
        assert_close(found[1][key], found[0][key], rtol=1e-4, atol=1e-6)


def test_sft_loss_is_the_mean_over_all_answer_tokens() -> None:
    """By hand from the plain model's logits, not a mean of means."""
    learns = learner("sft", 30)
    batch = supervised()
    logits = learns.policy.backbone.model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).logits
    logp = torch.log_softmax(logits, -1)[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
    expected = -logp[batch.loss_mask[:, 1:]].mean().item()
    assert math.isclose(learns.measure(batch)["loss"], expected, rel_tol=1e-5)


def test_reward_loss_starts_near_ln_2_and_falls() -> None:
    learns = learner("reward_log_sig", 10_000, rate=3e-3)
    with torch.no_grad():
        assert learns.policy.head is not None
        learns.policy.head.weight.zero_()
    assert math.isclose(learns.measure(preference())["loss"], math.log(2), rel_tol=1e-6)
    for _ in range(20):
        learns.update([preference()])
    assert learns.measure(preference())["loss"] < 0.3


@pytest.mark.parametrize("settings", [{"ties": "half"}, {"ties": "rao_kupper", "margin": 0.5}])
def test_ties_that_teach_are_in_the_mean_and_not_in_the_accuracy(settings: dict[str, Any]) -> None:
    """A prompt whose answers are all tied counts in the loss; how the update is cut changes nothing."""
    batch = replace(preference(), rank=torch.tensor([0, 1, 2, 3, 1, 1, 0, 1, 1]))
    whole, cut, plain = learner("reward_log_sig", 10_000), learner("reward_log_sig", 1), learner("reward_log_sig", 1)
    for learns in (whole, cut):
        learns.algorithm = learns.algorithm.with_settings(settings)
    measured = whole.measure(batch)
    assert cut.measure(batch) == pytest.approx(measured, rel=1e-5)
    assert measured["accuracy"] == pytest.approx(plain.measure(batch)["accuracy"])
    assert abs(measured["loss"] - plain.measure(batch)["loss"]) > 1e-4
    for _ in range(30):
        whole.update([batch])
    assert whole.measure(batch)["loss"] < measured["loss"]


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 1])
def test_imitation_beside_rankings_is_of_the_best_answers_alone(micro_batch_tokens: int) -> None:
    """The gradient is the ranking's plus lm_coef times imitation's of the answers of rank 0, here rows 0, 5 and 6."""
    batch = preference()
    plain, both = (learner("reward_log_sig", micro_batch_tokens) for _ in range(2))
    both.algorithm = both.algorithm.with_settings({"lm_coef": 0.5})
    best = SupervisedBatch(*(value[[0, 5, 6]] for value in (batch.tokens, batch.attention_mask, batch.response_mask)))
    imitated = gradients(learner("sft", 10_000), [best])
    alone, added = gradients(plain, [batch]), gradients(both, [batch])
    for key, gradient in alone.items():
        assert_close(added[key], gradient + 0.5 * imitated.get(key, torch.tensor(0.0)), rtol=1e-4, atol=1e-6)
    assert max(gradient.abs().max() for gradient in imitated.values()) > 1e-4


def test_ptx_is_added_to_the_same_step() -> None:
    """The gradient with demonstrations is PPO's plus gamma times imitation's."""
    plain, both, imitation = learner("ppo", 10_000), learner("ppo", 10_000), learner("sft", 10_000)
    both.algorithm = both.algorithm.with_settings({"ptx_coef": 0.5})
    alone = gradients(plain, [experience(plain)])
    added = gradients(both, [experience(both), supervised(seed=9)])
    imitated = gradients(imitation, [supervised(seed=9)])
    for key, gradient in imitated.items():
        assert_close(added[key], alone[key] + 0.5 * gradient, rtol=1e-4, atol=1e-6)


def test_without_a_learning_rate_nothing_moves_and_the_ratio_is_1() -> None:
    learns = learner("ppo", 40, rate=0.0)
    before = weights_hash(learns.optimizer.weights())
    batch = experience(learns)
    for _ in range(3):
        measured = learns.update([batch])
        assert measured["ratio/first_max_error"] < 1e-6
        assert measured["kl/update_approx"] < 1e-10
        assert measured["clip/share"] == 0
    assert weights_hash(learns.optimizer.weights()) == before


def test_a_resting_group_keeps_its_weights_and_moments() -> None:
    """Critic warm-up: the policy neither moves nor gathers momentum."""
    learns = learner("ppo", 10_000)
    learns.rates = lambda update: {"value": 1e-2}
    before = {name: w.clone() for name, w in learns.optimizer.weights().items()}
    learns.update([experience(learns)])
    after = learns.optimizer.weights()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("policy/"))
    assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith("value/"))
    assert not any(key.startswith("policy/") for key in learns.optimizer.moments())


def test_schedules_by_hand() -> None:
    linear = OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate(linear, step, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = OptimizerConfig(learning_rate=2.0, schedule="cosine")
    assert math.isclose(learning_rate(cosine, 5, 10), 1.0)
    assert learning_rate(OptimizerConfig(learning_rate=3.0), 99, 100) == 3.0


def run(folder: Path, stop_after: int | None = None, *, dropout: float = 0.1, settings: str = "s") -> Learner:
    """Ten steps of SFT with dropout, a checkpoint every three; cut short in the middle of a step if asked."""
    learns = learner("sft", 40, dropout=dropout)
    source = DatasetSource(list(range(13)), lambda rows: supervised(4, seed=int(sum(rows))), 4, seed=5)
    if stop_after is not None:
        update, steps = learns.update, iter(range(stop_after))

        def interrupted(batches: Sequence[Any]) -> Any:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return update(batches)

        learns.update = interrupted  # type: ignore[method-assign]
    train(
        source,
        learns,
        folder=folder,
        total_steps=10,
        config=TrainingConfig(checkpoint_every=3),
        seed=7,
        settings_hash=settings,
        open_monitor=lambda start, before: Monitor(
            folder,
            stage="sft",
            total_steps=10,
            console=None,
            tensorboard=False,
            start_step=start,
            seconds_before=before,
        ),
        evaluate=lambda: {"loss/heldout": learns.measure(supervised(6, seed=99))["loss"]},
    )
    return learns


@pytest.mark.parametrize("stops", [[1], [5], [7, 2], [9]])
def test_interrupted_and_resumed_is_uninterrupted(stops: list[int], tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer moments and every logged number but times."""
    whole = run(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", stop)
    resumed = run(tmp_path / "cut")
    assert weights_hash(resumed.optimizer.weights()) == weights_hash(whole.optimizer.weights())
    assert weights_hash(resumed.optimizer.moments()) == weights_hash(whole.optimizer.moments())
    logs = [
        [
            {k: v for k, v in row.items() if not any(word in k for word in ("seconds", "per_second", "rss_gb"))}
            for row in read_metrics(tmp_path / f)
        ]
        for f in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == list(range(11))


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match="other settings"):
        run(tmp_path, settings="t")


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((4,), float(step))}, {"w:exp_avg": torch.zeros(4)}, {"seconds": 1.5})


def test_old_checkpoints_are_forgotten(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 3 and found.state == {"seconds": 1.5}
    assert torch.equal(found.weights["w"], torch.full((4,), 3.0))


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    newest = tmp_path / "checkpoints" / "step-000002"
    weights = newest / "weights.safetensors"
    match harm:
        case "flip":
            raw = bytearray(weights.read_bytes())
            raw[-1] ^= 1
            weights.write_bytes(raw)
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-3])
        case "missing":
            weights.unlink()
        case "manifest":
            (newest / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match=r"step-000002: .*the checkpoint before it is used"):
        found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 1


def test_pieces_hold_the_budget_and_every_row_once() -> None:
    mask = torch.arange(12) < torch.tensor([12, 3, 7, 5, 12, 1])[:, None]
    cut = list(pieces(mask, 24))
    assert sorted(torch.cat(cut).tolist()) == list(range(6))
    assert all(int(mask[rows].sum(-1).max()) * len(rows) <= 24 for rows in cut)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    for rows in pieces(mask, 12, by=groups):
        kept = set(groups[rows].tolist())
        assert sum(int((groups == g).sum()) for g in kept) == len(rows)
