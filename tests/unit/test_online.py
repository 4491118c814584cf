"""Every online recipe on a model of two layers, through the command; what is refused; redraws, baselines, bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dressage import assemble
from dressage.algorithms.catalog import algorithm
from dressage.algorithms.trust_region import exact_kl
from dressage.batches import Experience, PreferenceBatch, SupervisedBatch, select
from dressage.config import LoraConfig, OptimizerConfig, PpoConfig
from dressage.errors import ConfigError, EngineError
from dressage.models.files import load_backbone, weights_hash
from dressage.models.roles import Role, ScalarHead
from dressage.models.scoring import score_logits, score_tokens, score_values
from dressage.monitor.writers import read_metrics
from dressage.recipe import load_stage, read_yaml, recipes
from dressage.schema import Completion, Reward, Rollout
from dressage.settings import ModelConfig
from dressage.training.batch_sources import RolloutSource
from dressage.training.online import online_algorithm
from dressage.training.optimizer import Optimizer
from dressage.training.trainer import _learn
from dressage.training.update import Learner

ONLINE = [name for name in recipes() if read_yaml(name).get("kind") == "ppo" and "rewards" not in read_yaml(name)]
NAMES = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with demonstrations.jsonl and a reward model on the tiny model."""
    from typer.testing import CliRunner

    from dressage.cli import app

    folder = tmp_path_factory.mktemp("online")
    rows = [{"prompt": f"Who is {name}?", "completion": f"{name} is a friend."} for name in NAMES]
    ranked = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No."} for row in rows]
    for name, lines in {"demonstrations.jsonl": rows, "rankings.jsonl": ranked}.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    asked = ["reward", f"model.name={tiny_model}", f'data.sources=["{folder / "rankings.jsonl"}"]', "depth=1"]
    asked += ["lora.rank=2", "training.steps=2", "--out", str(folder / "reward")]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code == 0, ran.output
    return folder


def small(made: Path, tiny_model: Path) -> list[str]:
    """Settings that make any online recipe take a second."""
    return [
        f"model.name={tiny_model}",
        f'prompts.sources=["{made / "demonstrations.jsonl"}"]',
        f"reward_model={made / 'reward' / 'reward'}",
        "lora={rank: 2, alpha: 4}",
        "rollout.max_new_tokens=8",
        "training={steps: 2, checkpoint_every: 1, micro_batch_tokens: 256}",
    ]


@pytest.mark.parametrize("name", ONLINE)
def test_each_recipe_trains_a_policy(
    name: str, dressage: Callable[..., Any], made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    ran = dressage("rl", name, *small(made, tiny_model), "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    row = algorithm(read_yaml(name).get("algorithm", "ppo"))
    assert (tmp_path / "run" / "policy" / "adapter_model.safetensors").is_file()
    own_critic = "value" in row.roles and read_yaml(name).get("value", {}).get("start") != "zero"
    assert (tmp_path / "run" / "value").is_dir() == own_critic
    logged = read_metrics(tmp_path / "run")
    assert len(logged) == 2
    first = logged[0]
    assert ("value/explained_variance" in first) == ("loss/value" in first) == ("value" in row.roles)
    assert ("groups/alike_share" in first) == (row.fewest_answers > 1 or row.teach is not None)
    assert ("kept/share" in first) == (row.teach is not None)
    assert ("trust_region/kl" in first) == (name == "trpo")
    assert row.advantage is None or first["ratio/first_max_error"] < 1e-4
    assert first["gradient/norm"] > 0 and first["time/rollout_tokens_per_second"] > 0


def test_the_kl_over_the_vocabulary_is_priced_learnt_and_logged(
    dressage: Callable[..., Any], made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Nothing at the start, more than nothing after the first update."""
    asked = ["kl={coef: 0.1, estimator: full}", "settings={kl_loss_coef: 0.1, full_kl: true}"]
    quick = [*small(made, tiny_model), "optimizer.learning_rate=0.01"]
    ran = dressage("rl", "rloo", *quick, *asked, "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output
    first, second = (row["kl/full_per_token"] for row in read_metrics(tmp_path / "run"))
    assert first == pytest.approx(0.0, abs=1e-6) and second > 1e-5
    ran = dressage("rl", "rloo", *quick, "kl.watch_full=true", "--out", tmp_path / "watched")
    watched = read_metrics(tmp_path / "watched")[1]
    assert "loss/kl" not in watched and watched["kl/full_per_token"] > 1e-5


@pytest.mark.parametrize("name", ["dapo", "trpo", "remax"])
def test_a_dry_run_reckons_with_what_a_method_adds(
    name: str, dressage: Callable[..., Any], made: Path, tiny_model: Path
) -> None:
    """Redraws, products with the Fisher matrix, greedy answers: more operations than without."""
    plain = {"dapo": "settings.redraws=0", "trpo": "algorithm=ppo", "remax": "algorithm=reinforce"}[name]
    operations = []
    for changes in ([], [plain]):
        ran = dressage("rl", name, *small(made, tiny_model), *changes, "--dry-run")
        assert ran.exit_code == 0 and "2 rounds of" in ran.stdout, ran.output
        operations.append(float(re.findall(r"\((\S+) operations", ran.stdout)[0]))
        assert ("draws more" in ran.stdout) == (name == "dapo" and not changes)
    assert operations[0] > operations[1]


@pytest.mark.parametrize(
    ("name", "changes", "work", "more"),
    [
        ("rejection_sampling", [], "12 are learnt from, 2 updates a round (1 x 12 / 6)", ["settings.best=7"]),
        ("rejection_sampling", ["settings={best: 3, round_share: 0.5}"], "18 are learnt from, 3 updates", []),
        ("expert_iteration", [], "at last 24; 8 updates a round (2 x 24 / 6)", ["training.steps=3"]),
        ("online_dpo", ["minibatch_size=6"], "24 answers of at most 8 tokens; 4 updates a round (1 x 24 / 6)", []),
        ("online_dpo", ["rollout.answers_per_prompt=4"], "24 are learnt from, 1 updates", ["settings.all_pairs=true"]),
    ],
)
def test_a_dry_run_counts_what_is_learnt_from(
    name: str,
    changes: list[str],
    work: str,
    more: list[str],
    dressage: Callable[..., Any],
    made: Path,
    tiny_model: Path,
) -> None:
    """Of 12 prompts with 8 answers each (2 of DPO), in 2 rounds; selecting more costs more."""
    ran = dressage("rl", name, *small(made, tiny_model), *changes, "--dry-run")
    assert ran.exit_code == 0 and work in " ".join(ran.stdout.split()), ran.output
    if more:
        dearer = dressage("rl", name, *small(made, tiny_model), *changes, *more, "--dry-run").stdout
        costs = [float(re.findall(r"\((\S+) operations", said)[0]) for said in (ran.stdout, dearer)]
        assert costs[1] > costs[0]


def test_ppo_and_rl_without_a_recipe_take_settings_alone(
    dressage: Callable[..., Any], made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    asked = [*small(made, tiny_model), "rollout.prompts_per_step=4", "minibatch_size=2"]
    ran = dressage("rl", "algorithm=rloo", *asked, "rollout.answers_per_prompt=2", "--out", tmp_path / "rl")
    assert ran.exit_code == 0, ran.output
    ran = dressage("ppo", "algorithm=grpo", *asked, "rollout.answers_per_prompt=2", "--out", tmp_path / "ppo")
    assert ran.exit_code == 0, ran.output
    assert not (tmp_path / "ppo" / "value").exists()


def test_a_bounded_run_goes_on_where_it_was_stopped(
    dressage: Callable[..., Any], made: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, prices that adapt and answers kept from earlier rounds are all in the checkpoint."""
    from dressage.training import trainer

    save = trainer.save_checkpoint

    def save_then_stop(*given: Any) -> Path:
        save(*given)
        raise KeyboardInterrupt

    for name in ("trpo", "ppo_penalty", "expert_iteration", "online_dpo"):
        asked = ["rl", name, *small(made, tiny_model), "--out"]
        assert dressage(*asked, tmp_path / name / "whole").exit_code == 0
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "save_checkpoint", save_then_stop)
            assert dressage(*asked, tmp_path / name / "cut").exit_code == 130
        assert dressage(*asked, tmp_path / name / "cut").exit_code == 0
        whole, cut = (
            (tmp_path / name / run / "policy" / "adapter_model.safetensors").read_bytes() for run in ("whole", "cut")
        )
        assert whole == cut


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["algorithm=grpo"], "answers_per_prompt=1.*grpo.*at least 2"),
        (["algorithm=sft"], "'sft'.*does not learn from sampled answers.*grpo"),
        (["algorithm=grppo"], "grppo"),
        (["settings.clip_hihg=0.3"], "clip_high"),
        (["settings.redraws=2"], r"settings\.redraws.*answers_per_prompt=1"),
        (["algorithm=trpo", "value.start=zero"], r'value\.start="zero".*settings\.max_kl'),
        (["algorithm=ppo_penalty", "minibatch_size=null"], r"settings\.old_kl_coef.*reuse"),
        (["settings.full_kl=true"], r"settings\.full_kl.*settings\.kl_loss_coef=0"),
        (["algorithm=rejection_sampling"], r"settings\.best keeps all.*answers_per_prompt=1"),
        (["algorithm=online_dpo"], "answers_per_prompt=1.*online_dpo.*at least 2"),
        (["algorithm=dpo"], "'dpo'.*does not learn from sampled answers.*online_dpo"),
        (["algorithm=online_dpo", "rollout.answers_per_prompt=2", "minibatch_size=3"], "minibatch_size=3.*multiple"),
    ],
)
def test_contradictions_are_named(changes: list[str], message: str) -> None:
    settings = load_stage("ppo", "ppo", changes)
    assert isinstance(settings, PpoConfig)
    with pytest.raises(ConfigError, match=message):
        online_algorithm(settings)


def test_what_has_no_critic_is_not_asked_for_one() -> None:
    settings = load_stage("ppo", "rloo", ["lora=null"])
    assert isinstance(settings, PpoConfig)
    assert "value" not in online_algorithm(settings).roles


def test_more_soft_tokens_than_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"soft_tokens=41.*max_new_tokens=40"):
        load_stage("ppo", "dapo", ["soft_tokens=41"])


# --- draws


class Judge:
    """Scores answers by a rule, and remembers how many it was shown at once."""

    def __init__(self, rule: Callable[[Rollout], float]) -> None:
        self.rule, self.shown = rule, []  # type: ignore[var-annotated]

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        self.shown.append(len(rollouts))
        return [Reward(self.rule(rollout)) for rollout in rollouts]


def source(name: str, made: Path, tiny_model: Path, judge: Judge, *changes: str) -> RolloutSource:
    """Rollouts of the tiny model, judged by a rule: 4 prompts of 12, with 3 answers each."""
    asked = [*small(made, tiny_model), "rollout.prompts_per_step=4", "rollout.answers_per_prompt=3"]
    settings = load_stage("ppo", name, [*asked, "minibatch_size=null", "truncated=keep", *changes])
    assert isinstance(settings, PpoConfig)
    template = assemble.build_template(settings.model)
    backbone = load_backbone(settings.model)
    policy = assemble.build_role(backbone, "policy", settings.lora, seed=1)
    return RolloutSource(
        config=settings,
        algorithm=online_algorithm(settings),
        prompts=assemble.build_rows("prompts", settings.prompts, template, 1).train,
        template=template,
        engine=assemble.build_engine("native", policy, template, 64),
        scorer=judge,
        policy=policy,
        reference=Role(backbone),
        value=None,
    )


def experience_of(rollouts: RolloutSource, step: int = 0) -> Experience:
    ((batch,),) = rollouts.draw(step).updates
    assert isinstance(batch, Experience)
    return batch


def odd(rollout: Rollout) -> float:
    """Answers differ for every second person only."""
    named = next(number for number, name in enumerate(NAMES) if name in rollout.prompt.text)
    return float(sum(rollout.completion.tokens)) if named % 2 else 0.25


class OffKey:
    """A sampler whose log-probs are not the policy's."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def generate(self, *asked: Any) -> list[Completion]:
        return [
            replace(one, logprobs=tuple(value - 0.01 for value in one.logprobs)) for one in self.engine.generate(*asked)
        ]


@pytest.mark.parametrize("reuse", ["null", "true", "false"])
def test_the_samplers_logprobs_are_taken_where_they_are_the_policys(reuse: str, made: Path, tiny_model: Path) -> None:
    """A policy that is read only for a few answers, unless its sampler is off key, or it is to be read."""
    drawn = source("rloo", made, tiny_model, Judge(odd), f"rollout.reuse_engine_logprobs={reuse}")
    found = drawn.draw(0)
    ((batch,),) = found.updates
    assert isinstance(batch, Experience)
    answer = batch.response_mask
    sampled, own = batch.engine_logprobs[answer], batch.old_logprobs[answer]
    assert torch.equal(own, sampled) == (reuse != "false")
    assert torch.allclose(own, sampled, atol=1e-4)
    assert 0 < found.metrics["engine/max_logprob_difference"] < 1e-4  # known although nothing else was read
    drawn.engine = OffKey(drawn.engine)  # type: ignore[assignment]
    if reuse == "true":
        with pytest.raises(EngineError, match=r"^rollout\.reuse_engine_logprobs: .* by 1\.0e-02, above 0\.001; set it"):
            drawn.draw(0)
        return
    again = drawn.draw(0)
    ((batch,),) = again.updates
    assert isinstance(batch, Experience) and torch.allclose(batch.old_logprobs[answer], own, atol=1e-4)
    assert again.metrics["engine/max_logprob_difference"] == pytest.approx(0.01, abs=1e-4)


def test_a_policy_that_is_read_for_its_values_tells_its_logprobs_too(made: Path, tiny_model: Path) -> None:
    drawn = source("rloo", made, tiny_model, Judge(odd), "kl={coef: 0.1, estimator: full}")
    batch = experience_of(drawn)
    answer = batch.response_mask
    assert not torch.equal(batch.old_logprobs[answer], batch.engine_logprobs[answer])


def test_groups_without_spread_are_left_out_and_drawn_again(made: Path, tiny_model: Path) -> None:
    """12 prompts in 3 draws of 4, six of whose answers differ: 4 groups are kept, and learnt from."""
    judge = Judge(odd)
    drawn = source("dapo", made, tiny_model, judge, "score_clip=null")
    found = drawn.draw(0)
    batch = found.updates[0][0]
    assert isinstance(batch, Experience)
    assert 2 <= len(judge.shown) <= 3 and set(judge.shown) == {12}
    counts = batch.group.bincount()
    assert counts[counts > 0].tolist() == [3] * 4
    per_answer = batch.advantages.abs().amax(-1)
    for group in batch.group.unique():
        assert per_answer[batch.group == group].max() > 0
    asked = sum(judge.shown) // 3
    assert 0.3 < found.metrics["groups/alike_share"] < 0.7 and asked in (8, 12)

    plain = Judge(odd)
    whole = source("grpo", made, tiny_model, plain, "score_clip=null")
    assert len(experience_of(whole).tokens) == 12 and plain.shown == [12]


def test_redraws_are_bounded_and_never_leave_nothing(made: Path, tiny_model: Path) -> None:
    judge = Judge(lambda rollout: 1.0)
    drawn = source("dapo", made, tiny_model, judge)
    batch = experience_of(drawn)
    assert judge.shown == [12] * 4  # redraws=3
    assert len(batch.tokens) == 12 and not batch.advantages.any()
    one = Judge(lambda rollout: odd(rollout) if "Ben" in rollout.prompt.text else 0.0)
    few = source("dapo", made, tiny_model, one, "score_clip=null")
    assert len(experience_of(few).tokens) == 3


def test_a_step_draws_the_same_again_and_others_than_the_next(made: Path, tiny_model: Path) -> None:
    first, again, later = (
        experience_of(source("dapo", made, tiny_model, Judge(odd)), step).tokens for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert first.shape != later.shape or not torch.equal(first, later)


def test_each_answer_of_a_round_has_its_own_limit(made: Path, tiny_model: Path) -> None:
    lengths = []
    for step, batch in ((0, 64), (0, 3), (1, 64)):
        drawn = source(
            "grpo", made, tiny_model, Judge(odd), "rollout.length_range=[2, 6]", f"rollout.max_batch={batch}"
        )
        lengths.append(sorted(experience_of(drawn, step).response_mask.sum(-1).tolist()))
    assert lengths[0] == lengths[1] != lengths[2]
    assert min(lengths[0]) >= 2 and max(lengths[0]) <= 6 and len(set(lengths[0])) > 2


@pytest.mark.parametrize("limits", ["[5, 4]", "[2, 41]"])
def test_a_range_of_lengths_goes_up_to_the_limit(limits: str) -> None:
    with pytest.raises(ConfigError, match=r"length_range=.* must go up, to no more than max_new_tokens=40"):
        load_stage("ppo", "ppo", [f"rollout.length_range={limits}"])


def test_remax_compares_with_the_likeliest_answer(made: Path, tiny_model: Path) -> None:
    """A prompt's own greedy answer, scored under the same rules, is what is taken off."""
    judge = Judge(lambda rollout: float(sum(rollout.completion.tokens) % 7))
    drawn = source("remax", made, tiny_model, judge, "kl.coef=0")
    batch = experience_of(drawn)
    assert judge.shown == [12, 4]
    scores = [float(row[mask].sum() % 7) for row, mask in zip(batch.tokens, batch.response_mask, strict=True)]
    likeliest: dict[int, float] = {}
    for group, row, mask in zip(batch.group.tolist(), batch.tokens, batch.response_mask, strict=True):
        tokens = row[: int(mask.nonzero()[0])].tolist()
        for _ in range(8):
            logits = drawn.policy.backbone.model(input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
            if tokens[-1] in drawn.template.stop_tokens:
                break
        likeliest[group] = float(sum(tokens[int(mask.nonzero()[0]) :]) % 7)
    expected = torch.tensor([s - likeliest[g] for s, g in zip(scores, batch.group.tolist(), strict=True)])
    assert torch.equal(batch.advantages, (expected[:, None] * batch.response_mask))
    assert expected.any()


def test_the_old_policys_price_adapts_and_reaches_the_loss(made: Path, tiny_model: Path) -> None:
    drawn = source("ppo", made, tiny_model, Judge(odd), "algorithm=reinforce_pp", "settings.old_kl_coef=1", "reuse=2")
    measured = {"kl/reference_per_answer": 0.0}
    assert drawn.draw(0).settings == {"old_kl_coef": 1.0}
    for gone, expected in [(0.02, 2.0), (0.01, 2.0), (0.001, 1.0), (0.0, 0.5)]:
        drawn.learnt(0, measured | {"kl/update_last": gone})
        assert drawn.old_kl_coef == expected
    other = source("ppo", made, tiny_model, Judge(odd), "algorithm=reinforce_pp", "settings.old_kl_coef=1", "reuse=2")
    other.restore(drawn.state())
    assert other.old_kl_coef == 0.5


# --- what is selected and ranked


def summed(batch: Any) -> list[float]:
    """What `Judge` is told below: the sum of an answer's tokens."""
    mask = batch.loss_mask if isinstance(batch, SupervisedBatch) else batch.response_mask
    return (batch.tokens * mask).sum(-1).float().tolist()  # type: ignore[no-any-return]


def by_sum(rollout: Rollout) -> float:
    return float(sum(rollout.completion.tokens))


def test_the_best_of_each_group_is_imitated_and_two_of_it_ranked(made: Path, tiny_model: Path) -> None:
    """The same 12 answers to 4 prompts for GRPO, rejection sampling and online DPO."""
    plain = experience_of(source("grpo", made, tiny_model, Judge(by_sum)))
    sums = torch.tensor(summed(plain))
    scores = torch.stack([sums[plain.group == prompt] for prompt in range(4)])
    drawn = source("rejection_sampling", made, tiny_model, Judge(by_sum), "score_clip=null").draw(0)
    ((kept,),) = drawn.updates
    assert isinstance(kept, SupervisedBatch)
    assert sorted(summed(kept)) == sorted(scores.amax(-1).tolist())
    assert drawn.metrics["kept/share"] == pytest.approx(1 / 3)

    online = source("online_dpo", made, tiny_model, Judge(by_sum), "score_clip=null")
    ((pairs,),) = online.draw(0).updates
    assert isinstance(pairs, PreferenceBatch) and pairs.ref_answer_logprobs is not None
    found = dict(zip(zip(pairs.group.tolist(), pairs.rank.tolist(), strict=True), summed(pairs), strict=True))
    assert found == {(g, r): float(s[r]) for g in range(4) for s in [scores[g].aminmax()[::-1]] for r in (0, 1)}
    with torch.no_grad():
        said = score_tokens(online.reference, pairs.tokens, pairs.attention_mask, pairs.response_mask).logprobs
    assert torch.allclose(pairs.ref_answer_logprobs, said.sum(-1), atol=1e-4)


def test_policy_and_reference_begin_as_one_at_any_temperature(
    dressage: Callable[..., Any], made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Both read the answers at the temperature at which they were sampled: DPO begins at ln 2."""
    settings = ["rollout.temperature=0.6", "training.steps=1", "rollout.prompts_per_step=4"]
    ran = dressage("rl", "online_dpo", *small(made, tiny_model), *settings, "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output
    (first,) = read_metrics(tmp_path / "run")
    assert first["loss/train"] == pytest.approx(0.693147, abs=1e-5)
    assert first["margin/train"] == pytest.approx(0.0, abs=1e-5)


def test_ranked_answers_stay_together_in_minibatches(made: Path, tiny_model: Path) -> None:
    drawn = source("online_dpo", made, tiny_model, Judge(by_sum), "score_clip=null", "minibatch_size=4", "reuse=2")
    updates = drawn.draw(0).updates
    assert len(updates) == 4
    for (batch,) in updates:
        assert isinstance(batch, PreferenceBatch)
        assert sorted(batch.rank.tolist()) == [0, 0, 1, 1] and len(batch.group.unique()) == 2


def test_a_round_that_keeps_nothing_teaches_nothing(made: Path, tiny_model: Path) -> None:
    for name, changes in (("rejection_sampling", ["settings.threshold=2"]), ("online_dpo", [])):
        found = source(name, made, tiny_model, Judge(lambda rollout: 1.0), *changes).draw(0)
        assert found.updates == [] and found.metrics["kept/share"] == 0


def test_a_price_on_kl_is_taken_off_before_answers_are_compared(made: Path, tiny_model: Path) -> None:
    """At first the policy is the reference, and the price nothing; with an adapter that says something it decides."""
    kept = []
    for price in (0.0, 1000.0):
        drawn = source("rejection_sampling", made, tiny_model, Judge(by_sum), "score_clip=null", f"kl.coef={price}")
        with torch.no_grad():
            for parameter in drawn.policy.parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        ((batch,),) = drawn.draw(0).updates
        kept.append(sorted(summed(batch)))
    assert kept[0] != kept[1] and sum(kept[0]) > sum(kept[1])


def test_expert_iteration_learns_all_rounds_from_the_first_weights(made: Path, tiny_model: Path) -> None:
    """Its second round is what a fresh learner makes of both rounds' answers."""
    drawn = source("expert_iteration", made, tiny_model, Judge(by_sum), "reuse=1")
    first, second = drawn.draw(0), drawn.draw(1)
    assert [len(one.updates[0][0].tokens) for one in (first, second)] == [4, 8]
    again = source("expert_iteration", made, tiny_model, Judge(by_sum), "reuse=1")
    again.restore(json.loads(json.dumps(drawn.state())))
    assert again.kept == drawn.kept

    def taught(*updates: Any) -> str:
        learns = learner("expert_iteration", tiny_model)
        for number, one in enumerate(updates):
            if number:
                learns.restart()
            _learn(learns, one)
        return weights_hash(learns.policy.parameters())

    assert taught(first.updates, second.updates) == taught(second.updates) != taught(first.updates)


# --- bounds on the step


def learner(name: str, tiny_model: Path, micro_batch_tokens: int = 10_000, **settings: Any) -> Learner:
    base = load_backbone(ModelConfig(name=str(tiny_model)))
    groups: dict[str, Any] = {}
    for role, seed in {"policy": 2, "value": 4}.items():
        base.add_adapter(role, LoraConfig(rank=4), seed=seed)
    policy, value = Role(base, "policy"), Role(base, "value", ScalarHead(base.width))
    # An adapter that says something: at the start, up is 0 and down gets no gradient.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    groups = {"policy": policy.parameters(), "value": value.parameters()}
    return Learner(
        algorithm=algorithm(name).with_settings(settings),
        policy=policy,
        value=value,
        optimizer=Optimizer(groups, OptimizerConfig(learning_rate=1e-2)),
        rates=lambda update: dict.fromkeys(groups, 1e-2),
        micro_batch_tokens=micro_batch_tokens,
        max_length=12,
    )


def made_up(learns: Learner) -> Experience:
    """Eight texts of which all but the first three tokens are answers, with advantages out of the air."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 13, (8,), generator=generator)
    mask = torch.arange(12) < lengths[:, None]
    tokens = torch.randint(0, 200, (8, 12), generator=generator).masked_fill(~mask, 0)
    response = mask & (torch.arange(12) >= 3)
    assert learns.value is not None
    with torch.no_grad():
        logprobs = score_tokens(learns.policy, tokens, mask, response).logprobs
        values = score_values(learns.value, tokens, mask, response)
    noise = torch.randn(8, 12, generator=generator).masked_fill(~response, 0.0)
    return Experience(
        tokens, mask, response, logprobs, logprobs, noise, torch.arange(8), logprobs, values, values + noise
    )


def logits_of(learns: Learner, batch: Experience) -> torch.Tensor:
    with torch.no_grad():
        return score_logits(learns.policy, batch.tokens, batch.attention_mask, batch.response_mask)


@pytest.mark.parametrize(("max_kl", "share"), [(0.02, 0.2), (0.0001, 0.8)])
def test_trpo_moves_a_real_policy_within_its_bound(max_kl: float, share: float, tiny_model: Path) -> None:
    """The closer the bound, the truer the quadratic model, and the more of the bound is used."""
    learns = learner("trpo", tiny_model, max_kl=max_kl)
    batch = made_up(learns)
    before, value_before = logits_of(learns, batch), weights_hash(learns.value.parameters())  # type: ignore[union-attr]
    first = learns.update([batch])
    kl = exact_kl(before, logits_of(learns, batch)).mean().item()
    assert share * max_kl < kl <= max_kl * (1 + 1e-4)
    assert first["trust_region/kl"] == pytest.approx(kl, rel=1e-3)
    second = learns.update([batch])
    assert second["loss/policy"] < first["loss/policy"] - 1e-4
    # The critic learns by its own optimizer, the policy has none.
    assert weights_hash(learns.value.parameters()) != value_before  # type: ignore[union-attr]
    assert all(name.startswith("value/") for name in learns.optimizer.moments())


def test_trpo_measures_curvature_on_a_share_of_the_answers(tiny_model: Path) -> None:
    """Of answers that are all the same, any share has the same Fisher matrix; of others, another: the bound stays."""

    def stepped(share: float, rows: list[int]) -> tuple[torch.Tensor, float]:
        learns = learner("trpo", tiny_model, max_kl=0.01, curvature_share=share)
        batch = select(made_up(learns), torch.tensor(rows))
        before = torch.cat([p.detach().flatten().clone() for p in learns.policy.parameters().values()])
        gone = learns.update([batch])["trust_region/kl"]
        after = torch.cat([p.detach().flatten() for p in learns.policy.parameters().values()])
        return after - before, gone

    alike = [stepped(share, [0] * 8)[0] for share in (1.0, 0.25)]
    torch.testing.assert_close(*alike, rtol=1e-3, atol=1e-6)
    (all_of_them, _), (some, gone) = (stepped(share, list(range(8))) for share in (1.0, 0.25))
    assert torch.nn.functional.cosine_similarity(all_of_them, some, dim=0) < 0.999
    assert 0 < gone <= 0.01


def test_trpos_step_is_the_same_however_the_batch_is_cut(tiny_model: Path) -> None:
    found = []
    for tokens in (10_000, 24):
        learns = learner("trpo", tiny_model, tokens)
        before = {name: p.detach().clone() for name, p in learns.policy.parameters().items()}
        learns.update([made_up(learns)])
        found.append(torch.cat([(p - before[name]).flatten() for name, p in learns.policy.parameters().items()]))
    assert found[0].norm() > 0
    assert torch.nn.functional.cosine_similarity(found[0], found[1], dim=0) > 0.999


def test_a_rounds_updates_end_where_the_policy_has_gone_too_far(tiny_model: Path) -> None:
    """The update that finds it moves nothing; the schedule goes on as if all had been made."""
    free, held = learner("ppo", tiny_model), learner("ppo", tiny_model, stop_kl=1e-4)
    batch = made_up(free)
    freely, stopped = _learn(free, [[batch]] * 5), _learn(held, [[batch]] * 5)
    assert "updates/made_share" not in freely
    assert stopped["updates/made_share"] in (0.2, 0.4, 0.6)
    assert stopped["kl/update_last"] > 1e-4
    assert free.updates == held.updates == 5

    one = learner("ppo", tiny_model)
    _learn(one, [[batch]] * round(5 * stopped["updates/made_share"]))
    assert weights_hash(one.policy.parameters()) == weights_hash(held.policy.parameters())
    assert weights_hash(one.policy.parameters()) != weights_hash(free.policy.parameters())
