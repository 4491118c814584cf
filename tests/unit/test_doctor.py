"""Every check of the doctor: well on a healthy model, and caught where the fault it is there for is planted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dressage import assemble, assemble_rewards
from dressage.algorithms import advantages
from dressage.batches import Ints, Mask, PerSequence
from dressage.data import collate
from dressage.data.template import ChatTemplate, Encoded
from dressage.doctor import CHECKS, examine, glance, subject
from dressage.doctor.check import Finding
from dressage.doctor.subject import Subject
from dressage.doctor.target import subject_of
from dressage.experience import build
from dressage.models import files, scoring
from dressage.models.backbone import Backbone
from dressage.models.roles import Role, ScalarHead
from dressage.recipe import load_stage
from dressage.rewards.learned import LearnedReward
from dressage.rollout import native
from dressage.schema import Reward, Rollout
from dressage.training import optimizer, update

NAMES = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay", "Gus", "Hal"]
PIPELINE = """
model: {{name: {model}}}
folder: {folder}
stages:
  sft:
    data: {{sources: [{demonstrations}], heldout_fraction: 0.0, max_tokens: 120}}
    lora: {{rank: 2, alpha: 4}}
    training: {{steps: 2, batch_size: 4}}
  reward:
    model: {{name: "stage:sft/policy"}}
    data: {{sources: [{rankings}], heldout_fraction: 0.0}}
    depth: 1
    lora: {{rank: 2, alpha: 4}}
    training: {{steps: 2, batch_size: 4}}
  ppo:
    model: {{name: "stage:sft/policy"}}
    prompts: {{sources: [{demonstrations}], heldout_fraction: 0.0}}
    reward_model: "stage:reward/reward"
    lora: {{rank: 2, alpha: 4}}
    rollout: {{prompts_per_step: 4, max_new_tokens: 8}}
    minibatch_size: 2
    training: {{steps: 1, checkpoint_every: 1}}
"""
Plant = Callable[[pytest.MonkeyPatch, Subject], object]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A pipeline of SFT, reward model and PPO, with its data, not yet run."""
    folder = tmp_path_factory.mktemp("doctor")
    rows = [{"prompt": f"Who is {name}?", "completion": f"{name}{'!' * i}"} for i, name in enumerate(NAMES)]
    ranked = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No."} for row in rows]
    for name, lines in {"demonstrations": rows, "rankings": ranked}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    paths = {name: folder / f"{name}.jsonl" for name in ("demonstrations", "rankings")}
    text = PIPELINE.format(model=tiny_model, folder=folder / "run", **paths)
    (folder / "loop.yaml").write_text(text, encoding="utf-8")
    return folder / "loop.yaml"


@pytest.fixture(scope="module")
def run_folder(recipe: Path) -> Path:
    """The same, run."""
    from typer.testing import CliRunner

    from dressage.cli import app

    folder = recipe.parent / "done"
    ran = CliRunner().invoke(app, ["run", str(recipe), "--out", str(folder)])
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def healthy(recipe: Path, scratch: Path) -> Subject:
    return subject_of(str(recipe), [], scratch)


def finding(number: int, of: Subject) -> Finding:
    (check,) = (check for check in CHECKS if check.number == number)
    (result,) = examine(of, [check])
    return result.finding


# --- all is well ------------------------------------------------------------------------------------------------------


def test_a_healthy_recipe(healthy: Subject) -> None:
    levels = {one.check.number: one.finding for one in examine(healthy)}
    assert list(levels) == list(range(1, 32))
    nothing_to_see = {number for number, one in levels.items() if one.level == "not applicable"}
    # The tiny tokenizer has no mark of beginning, no adapter is below, and no reward model is there yet.
    assert nothing_to_see == {4, 18, 21}
    assert {number: one for number, one in levels.items() if one.level not in ("ok", "not applicable")} == {}


def test_a_healthy_run(run_folder: Path, scratch: Path) -> None:
    """Its last policy goes on from an adapter, and its reward model is there."""
    of = subject_of(str(run_folder), [], scratch)
    assert of.model.name == str(run_folder / "sft" / "policy") and of.judge.depth == 1
    levels = {one.check.number: one.finding for one in examine(of)}
    assert {number for number, one in levels.items() if one.level == "not applicable"} == {4}
    assert {number: one for number, one in levels.items() if one.level not in ("ok", "not applicable")} == {}
    assert "0.0e+00 nats" in levels[18].evidence or "e-0" in levels[18].evidence


# --- every fault is caught --------------------------------------------------------------------------------------------


def around(patch: pytest.MonkeyPatch, where: Any, name: str, change: Callable[..., Any]) -> None:
    """The same function, with `change(result, *arguments)` in place of its result."""
    original = getattr(where, name)
    patch.setattr(where, name, lambda *given, **named: change(original(*given, **named), *given))


def no_label_on_the_end(patch: pytest.MonkeyPatch) -> None:
    around(patch, ChatTemplate, "encode_demonstration", lambda e, *_: replace(e, loss_mask=(*e.loss_mask[:-1], False)))


def labels_on_padding(patch: pytest.MonkeyPatch) -> None:
    around(patch, collate, "_padded", lambda made, *_: (made[0], made[1], made[2] | ~made[1]))


def a_letter_is_lost(patch: pytest.MonkeyPatch) -> None:
    around(patch, ChatTemplate, "decode", lambda text, *_: text[1:])


def two_beginnings(patch: pytest.MonkeyPatch) -> None:
    with_a_beginning(patch)
    around(patch, ChatTemplate, "_encode", lambda made, self, _: ([made[0][0], *made[0]], [False, *made[1]]))


def with_a_beginning(patch: pytest.MonkeyPatch) -> None:
    """Which the template writes itself, as SmolLM2's does."""
    around(patch, assemble, "load_tokenizer", lambda made, *_: (setattr(made, "bos_token", "<|im_start|>"), made)[1])


def two_ends(patch: pytest.MonkeyPatch) -> None:
    around(patch, ChatTemplate, "_answer_ids", lambda ids, self, *_: [*ids, self.end_token])


def masks_from_ids(patch: pytest.MonkeyPatch) -> None:
    around(patch, collate, "_padded", lambda made, rows, pad: (made[0], made[0] != pad, made[2]))


def sampled_masks_from_ids(patch: pytest.MonkeyPatch) -> None:
    from dressage.doctor import text

    around(patch, text, "tensors_of", lambda made, rows, pad: replace(made, attention_mask=made.tokens != pad))


def lost_without_a_reason(patch: pytest.MonkeyPatch) -> None:
    around(
        patch,
        subject,
        "prepare_demonstrations",
        lambda made, *_: replace(made, rows=made.rows[1:], indices=made.indices[1:]),
    )


def cut_unasked(patch: pytest.MonkeyPatch) -> None:
    from dressage.data import prepare

    def cut(whole: Encoded, limit: int, way: str) -> tuple[Encoded, bool]:
        return Encoded(whole.tokens[:limit], whole.loss_mask[:limit]), len(whole.tokens) > limit

    patch.setattr(prepare, "_fitted", cut)


def padding_is_read(patch: pytest.MonkeyPatch) -> None:
    original = Role.hidden
    patch.setattr(Role, "hidden", lambda self, tokens, mask: original(self, tokens, torch.ones_like(mask)))


def scores_of_neighbours(patch: pytest.MonkeyPatch) -> None:
    from dressage.rewards import learned

    around(patch, learned, "score_sequences", lambda scores, *_: scores + 0.1 * scores.mean())


def dropout_left_on(patch: pytest.MonkeyPatch) -> None:
    def drop(_: None, backbone: Backbone, name: str, *rest: Any) -> None:
        for linear in backbone.linears.values():
            linear.dropout = dict.fromkeys(linear.dropout, 0.5)

    around(patch, Backbone, "add_adapter", drop)


def the_engine_forgets_the_adapter(patch: pytest.MonkeyPatch) -> None:
    original = assemble.build_engine
    patch.setattr(assemble, "build_engine", lambda kind, role, *rest: original(kind, Role(role.backbone), *rest))


def the_sampler_takes_no_temperature(patch: pytest.MonkeyPatch) -> None:
    original = native.draw
    patch.setattr(native, "draw", lambda *given, **named: original(*given, **(named | {"temperature": 1.0})))


def a_rate_of_zero_moves(patch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def move(norm: float, self: optimizer.Optimizer, rates: Any) -> float:
        for parameter in self.named.values():
            parameter.add_(1e-6)
        return norm

    around(patch, optimizer.Optimizer, "step", move)


def the_reference_learns(patch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def move(sums: Any, self: update.Learner, batches: Any) -> Any:
        self.policy.backbone.model.get_input_embeddings().weight.mul_(1.0001)
        return sums

    around(patch, update.Learner, "update", move)


def the_policy_does_not_learn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizer.Optimizer, "step", lambda self, rates: 0.0)


def adapters_stay_off(patch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    patch.setattr(Backbone, "using", lambda self, name: nullcontext())


def the_head_is_saved_without_its_bias(patch: pytest.MonkeyPatch) -> None:
    original = files.save_tensors

    def save(tensors: Any, path: Path) -> None:
        original({name: t if name != "bias" else torch.zeros_like(t) for name, t in tensors.items()}, path)

    patch.setattr(files, "save_tensors", save)


def the_head_gives_two_numbers(patch: pytest.MonkeyPatch) -> None:
    around(patch, ScalarHead, "forward", lambda scores, *_: torch.stack([scores, -scores], -1))


def the_score_is_read_at_the_last_column(patch: pytest.MonkeyPatch) -> None:
    from dressage.rewards import learned

    def read(role: Role, tokens: Ints, attention_mask: Mask, last: Ints) -> PerSequence:
        return scoring.score_sequences(role, tokens, attention_mask, torch.full_like(last, tokens.shape[1] - 1))

    patch.setattr(learned, "score_sequences", read)


def the_score_is_read_one_token_early(patch: pytest.MonkeyPatch) -> None:
    from dressage.rewards import learned

    def read(role: Role, tokens: Ints, attention_mask: Mask, last: Ints) -> PerSequence:
        return scoring.score_sequences(role, tokens, attention_mask, last - 1)

    patch.setattr(learned, "score_sequences", read)


def gae_is_off_by_one(patch: pytest.MonkeyPatch) -> None:
    around(patch, advantages, "gae", lambda made, rewards, values, mask: made.roll(1, -1))


def gae_visits_what_was_not_chosen(patch: pytest.MonkeyPatch) -> None:
    original = advantages.gae

    def gae(rewards: Any, values: Any, mask: Mask, **rest: float) -> Any:
        return original(rewards, values, torch.ones_like(mask), **rest).masked_fill(~mask, 0.0)

    patch.setattr(advantages, "gae", gae)


def every_answer_is_finished(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native, "finish_of", lambda tokens, stops: "stop")


def what_meets_the_limit_is_cut(patch: pytest.MonkeyPatch) -> None:
    def finish(tokens: Any, stops: Any) -> str:
        return "stop" if tokens[-1] in stops and len(tokens) > 1 else "length"

    patch.setattr(native, "finish_of", finish)


def whitening_counts_padding(patch: pytest.MonkeyPatch) -> None:
    original = build.whiten
    patch.setattr(build, "whiten", lambda values, mask: original(values, torch.ones_like(mask)))


def a_mean_of_means(patch: pytest.MonkeyPatch) -> None:
    original = update.aggregate
    patch.setattr(update, "aggregate", lambda term, mask, *_: original(term, mask, update.count([mask])))


def moments_are_dropped(patch: pytest.MonkeyPatch) -> None:
    original = optimizer.Optimizer.restore
    patch.setattr(optimizer.Optimizer, "restore", lambda self, weights, moments: original(self, weights, {}))


def scored(patch: pytest.MonkeyPatch, reward: Callable[[Rollout], float]) -> None:
    from dressage.rewards.learned import LearnedReward

    patch.setattr(LearnedReward, "score", lambda self, rollouts: [Reward(reward(rollout)) for rollout in rollouts])


def a_reward_is_nan(patch: pytest.MonkeyPatch) -> None:
    scored(patch, lambda rollout: float("nan"))


def a_reward_differs_from_call_to_call(patch: pytest.MonkeyPatch) -> None:
    calls: Iterator[int] = itertools.count()
    scored(patch, lambda rollout: float(next(calls)))


def a_reward_raises(patch: pytest.MonkeyPatch) -> None:
    scored(patch, lambda rollout: 1 / 0)


def equal_groups_go_unseen(patch: pytest.MonkeyPatch) -> None:
    from dressage.training import batch_sources

    patch.setattr(batch_sources, "unlike", lambda scores, group: torch.ones_like(scores, dtype=torch.bool))


FAULTS: list[tuple[int, Callable[[pytest.MonkeyPatch], None]]] = [
    (1, no_label_on_the_end),
    (2, labels_on_padding),
    (3, a_letter_is_lost),
    (4, two_beginnings),
    (5, two_ends),
    (6, masks_from_ids),
    (6, sampled_masks_from_ids),
    (7, lost_without_a_reason),
    (8, cut_unasked),
    (9, padding_is_read),
    (10, scores_of_neighbours),
    (11, dropout_left_on),
    (12, the_engine_forgets_the_adapter),
    (13, the_sampler_takes_no_temperature),
    (15, a_rate_of_zero_moves),
    (16, the_reference_learns),
    (16, the_policy_does_not_learn),
    (17, adapters_stay_off),
    (19, the_head_is_saved_without_its_bias),
    (20, the_head_gives_two_numbers),
    (22, the_score_is_read_at_the_last_column),
    (22, the_score_is_read_one_token_early),
    (23, gae_is_off_by_one),
    (23, gae_visits_what_was_not_chosen),
    (24, every_answer_is_finished),
    (24, what_meets_the_limit_is_cut),
    (25, whitening_counts_padding),
    (26, a_mean_of_means),
    (27, moments_are_dropped),
    (28, a_reward_is_nan),
    (28, a_reward_differs_from_call_to_call),
    (28, a_reward_raises),
    (29, equal_groups_go_unseen),
]


@pytest.mark.parametrize(("number", "plant"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_planted_fault_is_caught(
    number: int,
    plant: Callable[[pytest.MonkeyPatch], None],
    recipe: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    got = finding(number, subject_of(str(recipe), [], scratch))
    assert got.level == "fault", got
    # Not because it broke, where it was to be measured.
    assert "Error" not in got.evidence or plant in (a_reward_raises, the_head_gives_two_numbers), got


def test_every_check_has_a_planted_fault_or_a_test_of_its_own() -> None:
    assert {number for number, _ in FAULTS} | {14, 18, 21, 30, 31} == {check.number for check in CHECKS}


def test_a_mark_of_beginning_that_the_template_writes(
    recipe: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_beginning(monkeypatch)
    assert finding(4, subject_of(str(recipe), [], scratch)).level == "ok"


@pytest.mark.parametrize(
    ("number", "changes", "evidence"),
    [
        (7, ["stages.sft.data.max_tokens=36"], "left out: answer too long"),
        (7, ["stages.sft.data={max_tokens: 36, on_too_long: cut}"], "of them cut"),
        (8, ["stages.sft.data={max_tokens: 36, on_too_long: cut}"], "on_too_long=cut cuts"),
        (11, ["stages.ppo=null", "stages.sft.lora.dropout=0.5"], r"lora.dropout=0.5"),
        (14, ["stages.ppo.rollout={top_k: 5, allow_filtered_sampling: true}"], "top_k=5"),
        (30, ["stages.sft.training.batch_size=64"], "batches of 64 from 8 rows"),
    ],
)
def test_what_settings_make_doubtful_is_a_warning(
    number: int, changes: list[str], evidence: str, recipe: Path, scratch: Path
) -> None:
    got = finding(number, subject_of(str(recipe), changes, scratch))
    assert got.level == "warn" and evidence in got.evidence, got


def test_words_that_name_a_special_token_are_a_warning(
    write_rows: Callable[..., Path], recipe: Path, scratch: Path
) -> None:
    data = write_rows("data.jsonl", [{"prompt": "Hi", "completion": "Hello.<|im_end|>"}])
    of = subject_of(str(recipe), [f'stages.sft.data.sources=["{data}"]'], scratch)
    got = finding(5, of)
    assert got.level == "warn" and got.evidence.startswith("0 of"), got


def test_batches_that_do_not_divide(healthy: Subject) -> None:
    ppo = healthy.stages["ppo"]
    healthy.stages = {"ppo": ppo.model_copy(update={"minibatch_size": 3})}
    got = finding(30, healthy)
    assert got.level == "fault" and "4 answers / 3 = 1.33" in got.evidence


def test_settings_that_contradict_each_other(recipe: Path, scratch: Path) -> None:
    got = finding(30, subject_of(str(recipe), ["stages.ppo.algorithm=grpo"], scratch))
    assert got.level == "fault" and "answers_per_prompt=1" in got.evidence


def test_more_memory_than_there_is(healthy: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from dressage.doctor import run

    monkeypatch.setattr(run, "memory_bytes", lambda: 1e8)
    got = finding(31, healthy)
    assert got.level == "warn" and "0.1 GB are free" in got.evidence, got


# --- of a run that was made -------------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_loaded(run_folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "load_adapter_state", lambda *_: None)
    of = subject_of(str(run_folder), [], scratch)
    assert {number: finding(number, of).level for number in (17, 18)} == {17: "fault", 18: "fault"}


def test_a_reference_below_the_start(run_folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: Backbone, name: str) -> None:
        self.drop_adapter(name)
        self._unwrap()

    monkeypatch.setattr(Backbone, "merge", forget)
    got = finding(18, subject_of(str(run_folder), [], scratch))
    assert got.level == "fault", got


def test_a_reward_model_of_another_system_turn(
    run_folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["stages.ppo.model.system=Be kind."]
    got = finding(21, subject_of(str(run_folder), changes, scratch))
    assert got.level == "ok" and got.evidence == "another system turn, written anew"
    build = assemble_rewards.build_reward_model
    monkeypatch.setattr(assemble_rewards, "build_reward_model", lambda *given: LearnedReward(build(*given).role))
    got = finding(21, subject_of(str(run_folder), changes, scratch))
    assert got.level == "fault" and got.evidence == "another system turn, read as they are"


@pytest.mark.parametrize(("body", "level"), [("len(answers)", "ok"), ("float('nan')", "fault")])
def test_a_reward_function_of_ones_own(body: str, level: str, run_folder: Path, scratch: Path) -> None:
    """Its NaN is told although the run would put a number in its place."""
    file = scratch / "mine.py"
    file.write_text(f"def grade(prompts, answers, targets, finished):\n    return [{body}] * len(answers)\n")
    changes = ["stages.ppo.reward_model=null", "stages.ppo.value.start=zero"]
    part = f"stages.ppo.rewards={{mine: {{type: function, function: '{file}:grade'}}}}"
    got = finding(28, subject_of(str(run_folder), [*changes, part], scratch))
    assert got.level == level, got


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_and_its_exit_code(
    dressage: Callable[..., Any], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = dressage("doctor", run_folder, "stages.sft.training.batch_size=2", "--json")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    told = json.loads(ran.stdout)
    assert told["model"] == str(run_folder / "sft" / "policy") and (told["fault"], told["warn"]) == (0, 0)
    assert [check["number"] for check in told["checks"]] == list(range(1, 32))
    assert told["checks"][0].keys() == {"number", "name", "verdict", "evidence", "remedy", "seconds"}
    assert "batches of 2 from 8 rows" in told["checks"][29]["evidence"]

    gae_is_off_by_one(monkeypatch)
    ran = dressage("doctor", run_folder)
    assert ran.exit_code == 1, ran.output + repr(ran.exception)
    assert "-> algorithms/advantages.py" in ran.stdout and "1 fault" in ran.stdout


@pytest.mark.parametrize(("folder", "kind"), [("ppo/policy", "policy"), ("reward/reward", "reward")])
def test_a_model_is_examined_with_the_starter_recipe(folder: str, kind: str, run_folder: Path, scratch: Path) -> None:
    """A policy is what would be trained; a reward model is what would judge, and its own base is trained."""
    of = subject_of(str(run_folder / folder), [], scratch)
    assert {"sft", "reward", "ppo"} <= of.stages.keys()
    assert of.model.name == str(run_folder / ("sft/policy" if kind == "reward" else folder))
    assert of.reward_folder == (run_folder / folder if kind == "reward" else None)
    if kind == "reward":
        assert finding(21, of).level == "ok" and of.judge.depth == 1


@pytest.mark.parametrize("target", ["absent", "empty"])
def test_bad_input(target: str, dressage: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = dressage("doctor", target if target == "absent" else tmp_path / target)
    assert ran.exit_code == 2 and "error: " in ran.stderr


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Hi", "completion": "Hello."}, "demonstrations"),
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, "rankings"),
        ({"prompt": "Hi", "completion": "Hello.", "label": True}, "ratings"),
        ({"prompt": "Hi"}, "prompts"),
    ],
)
def test_a_data_file_is_taken_for_what_it_is(
    row: dict[str, Any], kind: str, write_rows: Callable[..., Path], tiny_model: Path, scratch: Path
) -> None:
    data = write_rows("mine.jsonl", [row])
    of = subject_of(str(data), [f"model={{name: {tiny_model}}}"], scratch)
    (text,) = (text for text in of.texts if text.data.sources == (str(data),) and text.kind == kind)
    assert len(text.rows) == 1


# --- the short form ---------------------------------------------------------------------------------------------------


def test_a_training_run_begins_with_a_glance(
    dressage: Callable[..., Any], recipe: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["sft", f"model.name={tiny_model}", f'data.sources=["{recipe.parent / "demonstrations.jsonl"}"]']
    asked += ["training.steps=1", "training.batch_size=4", "lora.rank=2", "--out"]
    ran = dressage(*asked, tmp_path / "well")
    assert ran.exit_code == 0 and "quick checks, all well" in ran.stdout, ran.output
    no_label_on_the_end(monkeypatch)
    ran = dressage(*asked, tmp_path / "ill")
    warned = "doctor: fault: the end mark has a label: 0 of 8 answers end in a labelled '<|im_end|>'"
    assert ran.exit_code == 0 and warned in ran.stdout, ran.output
    notes = json.loads((tmp_path / "ill" / "data.json").read_text(encoding="utf-8"))["notes"]
    assert any(warned in note for note in notes)


def test_a_glance_needs_no_weights(recipe: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "load_backbone", lambda config: pytest.fail("weights were loaded"))
    changes = [f"model.name={tiny_model}", f'prompts.sources=["{recipe.parent / "demonstrations.jsonl"}"]']
    config: Any = load_stage("ppo", "ppo", [*changes, "rollout.top_k=5", "rollout.allow_filtered_sampling=true"])
    template = assemble.build_template(config.model)
    rows = assemble.build_rows("prompts", config.prompts, template, 1)
    (told,) = glance(config, template, "prompts", rows)
    assert told.startswith("doctor: warn: the whole distribution: top_p=1, top_k=5; rollout.top_p=1")


def test_the_page_names_every_check() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in page.splitlines() if line.startswith("|")]
    named = {(row[0], row[1], row[3]) for row in rows}
    assert {(str(check.number), check.name, check.remedy) for check in CHECKS} <= named
