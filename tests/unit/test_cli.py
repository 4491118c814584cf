"""The verbs, on a model of two layers: the whole loop, what is skipped and done anew, and what is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
Write = Callable[..., Path]

VERBS = ["quickstart", "run", "sft", "reward", "dpo", "ppo", "rl", "sample", "rank", "evaluate", "chat", "serve"]
VERBS += ["report", "doctor", "recipes", "algorithms", "feedback"]
STAGES = ["sft", "samples", "rank", "reward", "ppo", "before", "after", "evaluate"]
PIPELINE = """
description: The whole loop in seconds.
model: {{name: {model}}}
stages:
  sft:
    data: {{sources: [{demonstrations}], heldout_fraction: 0.2, max_tokens: 120}}
    lora: {{rank: 2, alpha: 4}}
    training: {{steps: 3, batch_size: 4}}
  samples:
    kind: sample
    model: {{name: "stage:sft/policy"}}
    prompts: {{sources: [{demonstrations}]}}
    answers_per_prompt: 3
    max_new_tokens: 8
  rank:
    answers: "stage:samples/answers.jsonl"
  reward:
    model: {{name: "stage:sft/policy"}}
    data: {{sources: ["stage:rank/rankings.jsonl"], heldout_fraction: 0.3}}
    depth: 1
    lora: {{rank: 2, alpha: 4}}
    training: {{steps: 2, batch_size: 4}}
  ppo:
    model: {{name: "stage:sft/policy"}}
    prompts: {{sources: [{demonstrations}], heldout_fraction: 0.0}}
    reward_model: "stage:reward/reward"
    gold: simulated
    lora: {{rank: 2, alpha: 4}}
    rollout: {{prompts_per_step: 4, max_new_tokens: 8}}
    minibatch_size: 2
    training: {{steps: 2, checkpoint_every: 1}}
  before:
    kind: sample
    model: {{name: "stage:sft/policy"}}
    prompts: {{sources: [{demonstrations}]}}
    max_new_tokens: 8
  after:
    kind: sample
    model: {{name: "stage:ppo/policy"}}
    prompts: {{sources: [{demonstrations}]}}
    max_new_tokens: 8
    measure_kl: true
  evaluate:
    model: {{name: "stage:sft/policy"}}
    before: "stage:before/answers.jsonl"
    after: "stage:after/answers.jsonl"
    reward_model: "stage:reward/reward"
"""
SUMMARY = {"seconds", "peak_rss_gb", "reward_accuracy", "gold_sft", "gold_ppo", "win_rate", "win_rate_low"}
SUMMARY |= {"win_rate_high", "kl_per_answer", "length_sft", "length_ppo", "finished_sft", "finished_ppo"}
SUMMARY |= {"distinct_sft", "distinct_ppo"}


@pytest.fixture
def recipe(write_rows: Write, tiny_model: Path, tmp_path: Path) -> Path:
    names = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea"]
    rows = [{"prompt": f"Who is {name}?", "completion": f"{name} is a friend."} for name in names]
    path = tmp_path / "loop.yaml"
    text = PIPELINE.format(model=tiny_model, demonstrations=write_rows("demonstrations.jsonl", rows))
    path.write_text(text, encoding="utf-8")
    return path


def done(output: str) -> dict[str, str]:
    """What the run said of each stage: "done", "gone on" or "skipped"."""
    said = re.split(r"^\d of \d  (\w+)", output, flags=re.MULTILINE)[1:]
    verdict = re.compile(r"^  (done|gone on|skipped)", re.MULTILINE)
    found = {name: verdict.search(text) for name, text in zip(said[::2], said[1::2], strict=True)}
    return {name: match[1] if match else "" for name, match in found.items()}


def written(out: Path) -> dict[Path, int]:
    """When each file in a stage's folder was last written."""
    files = [path for path in out.glob("*/*") if path.is_file() and path.name != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def ran_well(ran: Any) -> str:
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    return str(ran.stdout)


# --- what loads nothing -----------------------------------------------------------------------------------------------


def test_help_lists_the_verbs(dressage: Command) -> None:
    text = ran_well(dressage("--help"))
    assert re.findall(r"^│ ([a-z]+) ", text, re.MULTILINE) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(dressage: Command, verb: str) -> None:
    assert f"dressage {verb}" in ran_well(dressage(verb, "--help"))


def test_version_and_unknown_verbs(dressage: Command) -> None:
    assert ran_well(dressage("--version")).startswith("dressage ")
    assert dressage("teach").exit_code == 2
    assert dressage("sft", "--ouut", "x").exit_code == 2


def test_recipes_are_listed_and_printed(dressage: Command) -> None:
    listed = ran_well(dressage("recipes"))
    assert re.search(r"^quickstart\s+run\s+\w", listed, re.MULTILINE)
    assert re.search(r"^ppo\s+ppo\s+\w", listed, re.MULTILINE)
    assert "reward_model: runs/reward/reward" in ran_well(dressage("recipes", "ppo"))


def test_interrupted_and_unforeseen(dressage: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def forbid(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "runs/mine")

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dressage.recipe.recipes", interrupt)
    ran = dressage("recipes")
    assert (ran.exit_code, len(ran.stderr.splitlines())) == (130, 1) and "same command" in ran.stderr
    monkeypatch.setattr("dressage.recipe.recipes", forbid)
    ran = dressage("recipes")
    assert ran.exit_code == 2 and ran.stderr.startswith("error: runs/mine: Permission denied")
    monkeypatch.setattr("dressage.recipe.recipes", fail)
    # Our own mistakes are not made to look like the user's.
    assert isinstance(dressage("recipes").exception, ZeroDivisionError)


def test_debug_shows_where_an_error_came_from(dressage: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = dressage("--debug", "sft", "absent")
    assert ran.exit_code == 2 and "Traceback" in ran.stderr and "error: absent" in ran.stderr
    assert "Traceback" not in dressage("sft", "absent").stderr
    monkeypatch.setenv("DRESSAGE_DEBUG", "1")
    assert "Traceback" in dressage("sft", "absent").stderr


# --- the whole loop ---------------------------------------------------------------------------------------------------


def test_the_whole_loop(dressage: Command, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    text = ran_well(dressage("run", recipe, "--out", out))
    assert done(text) == dict.fromkeys(STAGES, "done")
    assert "SIMULATED" in text and "win rate" in text and f"report: {out / 'report.html'}" in text
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary.keys() >= SUMMARY and summary["seconds"].keys() == {*STAGES, "total"}
    assert list(json.loads((out / "pipeline.json").read_text(encoding="utf-8"))["stages"]) == STAGES
    assert "SIMULATED" in (out / "report.html").read_text(encoding="utf-8")

    # Nothing is done twice.
    before = written(out)
    assert done(ran_well(dressage("run", recipe, "--out", out))) == dict.fromkeys(STAGES, "skipped")
    assert written(out) == before

    # How often a checkpoint is saved changes no result; a learning rate does, and all that follows from it.
    asked = ["run", recipe, "--out", out, "stages.reward.training.checkpoint_every=1"]
    assert done(ran_well(dressage(*asked))) == dict.fromkeys(STAGES, "skipped")
    said = done(ran_well(dressage(*asked, "stages.reward.optimizer.learning_rate=3e-4")))
    assert said == dict.fromkeys(STAGES, "skipped") | dict.fromkeys(["reward", "ppo", "after", "evaluate"], "done")
    assert (out / "reward.old-1" / "stage.json").is_file()

    # A product that was touched is made again.
    with (out / "samples" / "answers.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    said = done(ran_well(dressage(*asked, "stages.reward.optimizer.learning_rate=3e-4")))
    assert said["samples"] != "skipped" and said["rank"] == "skipped" and said["sft"] == "skipped"


def test_the_loop_is_the_same_again(dressage: Command, recipe: Path, tmp_path: Path) -> None:
    """Equal seeds give equal products, to the bit; another seed gives others."""
    for name in ("one", "two"):
        ran_well(dressage("run", recipe, "--out", tmp_path / name))
    ran_well(dressage("run", recipe, "seed=2", "stages.ppo=null", "stages.after=null", "stages.evaluate=null",
                      "--out", tmp_path / "other"))  # fmt: skip
    made = ["sft/policy/adapter_model.safetensors", "samples/answers.jsonl", "rank/rankings.jsonl"]
    made += ["reward/reward/head.safetensors", "ppo/policy/adapter_model.safetensors"]
    for file in made[1:3]:
        # The models' folders are named in the answers, and differ.
        texts = [(tmp_path / name / file).read_text().replace(f"/{name}/", "/") for name in ("one", "two", "other")]
        assert texts[0] == texts[1] != texts[2]
    for file in (made[0], *made[3:]):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert (tmp_path / "one" / made[0]).read_bytes() != (tmp_path / "other" / made[0]).read_bytes()


def test_an_interrupted_run_goes_on(
    dressage: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after PPO's first round: the same command goes on, to the very same policy."""
    from dressage.training import trainer

    ran_well(dressage("run", recipe, "--out", tmp_path / "whole"))
    save = trainer.save_checkpoint

    def save_then_stop(folder: Path, checkpoint: Any, keep: int) -> Path:
        path = save(folder, checkpoint, keep)
        if folder.name == "ppo":
            raise KeyboardInterrupt
        return path

    out = tmp_path / "cut"
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_checkpoint", save_then_stop)
        ran = dressage("run", recipe, "--out", out)
    assert ran.exit_code == 130 and ran.stderr == "interrupted; the same command goes on from the last checkpoint\n"
    assert json.loads((out / "ppo" / "stage.json").read_text())["status"] == "interrupted"
    said = done(ran_well(dressage("run", recipe, "--out", out)))
    assert said == dict.fromkeys(STAGES[:4], "skipped") | {"ppo": "gone on"} | dict.fromkeys(STAGES[5:], "done")
    policy = "ppo/policy/adapter_model.safetensors"
    assert (out / policy).read_bytes() == (tmp_path / "whole" / policy).read_bytes()


def test_a_stage_that_fails_says_how_to_go_on(dressage: Command, recipe: Path, tmp_path: Path) -> None:
    ran = dressage(
        "run", recipe, "stages.rank.answers=null", "stages.rank.rankings=absent.jsonl", "--out", tmp_path / "o"
    )
    assert ran.exit_code == 2
    assert ran.stderr.splitlines()[0].startswith("error: absent.jsonl: no such file")
    assert ran.stderr.splitlines()[1:] == [
        "stopped at rank; the stages before it stay, and the same command goes on from here"
    ]
    assert (tmp_path / "o" / "sft" / "policy").is_dir() and not (tmp_path / "o" / "rank").exists()


# --- single verbs -----------------------------------------------------------------------------------------------------


def test_one_stage_its_report_and_a_talk(
    dressage: Command, write_rows: Write, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(
        "data.jsonl", [{"prompt": "How are you?", "completion": "Well."}, {"prompt": "Hi", "completion": "Hi"}]
    )
    monkeypatch.chdir(tmp_path)
    Path("my_sft.yaml").write_text(f"model: {{name: {tiny_model}, system: Be kind.}}\ndata: {{sources: [{data}]}}\n")
    text = ran_well(dressage("sft", "my_sft.yaml", "training.epochs=2", "data.heldout_fraction=0"))
    assert "report: runs/my_sft/report.html" in text
    assert json.loads(Path("runs/my_sft/stage.json").read_text())["settings"]["training"]["epochs"] == 2

    Path("runs/my_sft/report.html").unlink()
    assert ran_well(dressage("report", "runs/my_sft", "--language", "zh")).strip() == "runs/my_sft/report.html"
    assert 'lang="zh' in Path("runs/my_sft/report.html").read_text(encoding="utf-8")

    seen = {}
    monkeypatch.setattr(
        "dressage.serving.chat.chat", lambda engine, template, **given: seen.update(given, template=template)
    )
    ran_well(dressage("chat", "runs/my_sft/policy", "--temperature", "0", "--max-new-tokens", "5", "--seed", "3"))
    # The system turn that the adapter was trained with comes from its folder.
    assert seen["template"].system == "Be kind." and seen["system"] is None and seen["thinking"] is None
    sampling = seen["sampling"]
    assert (sampling.temperature, sampling.max_new_tokens, sampling.seed) == (0, 5, 3)


def test_a_talk_through_a_pipe(dressage: Command, tiny_model: Path) -> None:
    from typer.testing import CliRunner

    from dressage.cli import app

    asked = ["chat", str(tiny_model), "--max-new-tokens", "3", "--temperature", "0"]
    ran = CliRunner().invoke(app, asked, input="Hello\n/exit\n")
    assert ran.exit_code == 0, ran.output
    refused = dressage("chat", tiny_model / "absent")
    assert refused.exit_code == 2 and "no such model folder" in refused.stderr


def test_quickstart_takes_seed_folder_and_peoples_rankings(
    dressage: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("dressage.cli._foretell", lambda stages, folder: seen.update(stages, folder=folder))
    ran_well(dressage("quickstart", "--seed", "7", "--out", tmp_path / "q", "stages.ppo.kl.coef=0.5", "--dry-run"))
    assert seen["folder"] == tmp_path / "q" and seen["sft"].seed == 7 and seen["ppo"].kl.coef == 0.5
    assert seen["rank"].answers == str(tmp_path / "q" / "samples" / "answers.jsonl")
    seen.clear()
    ran_well(dressage("quickstart", "--rankings", "my rankings.jsonl", "--dry-run"))
    assert "samples" not in seen and seen["rank"].rankings == "my rankings.jsonl" and seen["rank"].answers is None
    assert seen["ppo"].gold is None and seen["evaluate"].judge == "reward"


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_as_the_run_does(dressage: Command, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    foretold = ran_well(dressage("run", recipe, "--out", out, "--dry-run"))
    assert not out.exists()
    assert foretold.count("known once the stages before have run") == 3
    ran_well(dressage("run", recipe, "--out", out))
    counted = ran_well(dressage("run", recipe, "--out", out, "--dry-run"))
    assert "known once" not in counted
    manifest = json.loads((out / "sft" / "data.json").read_text(encoding="utf-8"))
    learnt = re.search(r"train: (\d+) rows", str(manifest["notes"]))
    assert learnt and f"{learnt[1]} rows to learn from, {12 - int(learnt[1])} held out" in foretold
    # 2 layers of q [32, 32], k and v [32, 16], o [32, 32], gate and up [32, 64], down [64, 32], rank 2.
    weights = 2 * 2 * (64 + 48 + 48 + 64 + 96 + 96 + 96)
    from safetensors.torch import load_file

    saved = load_file(out / "sft" / "policy" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == weights
    assert f"learns   {weights:,} of" in foretold
    rounds = "2 rounds of 4 prompts x 1 answers = 4 answers of at most 8 tokens; 2 updates a round (1 x 4 / 2)"
    assert rounds in foretold


def test_a_dry_run_finds_what_the_run_would(
    dressage: Command, write_rows: Write, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_rows("data.jsonl", [{"prompt": "Hi", "completion": ""}])
    ran = dressage("sft", f"model.name={tiny_model}", f'data.sources=["{data}"]', "--out", tmp_path / "o", "--dry-run")
    assert ran.exit_code == 2 and "data.jsonl:1" in ran.stderr and not (tmp_path / "o").exists()


def test_micro_batches_are_cut_as_the_update_cuts_them(tiny_model: Path) -> None:
    import torch

    from dressage.config import TrainingConfig
    from dressage.training.preflight import Row, _cut
    from dressage.training.update import pieces

    lengths = [7, 3, 9, 2, 2, 5, 8, 1]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    wanted = [len(rows) * max(lengths[i] for i in rows.tolist()) for rows in pieces(mask, 18)]
    rows = [Row((length,), 0) for length in lengths]
    assert list(_cut(rows, TrainingConfig(micro_batch_tokens=18))) == wanted


def test_whole_weights_learn_against_a_reward_model_that_stands_still(
    dressage: Command, recipe: Path, tmp_path: Path
) -> None:
    """With lora=null the policy's weights move; the reward model, trained as an adapter on the same base, must not."""
    from dressage import assemble, assemble_rewards
    from dressage.config import PpoConfig
    from dressage.models.files import load_backbone
    from dressage.recipe import load_pipeline

    changed = ["stages.ppo.lora=null", "stages.ppo.value.start=zero"]
    ran_well(dressage("run", recipe, "--out", tmp_path / "run", *changed, "stages.after.measure_kl=false"))
    assert (tmp_path / "run" / "ppo" / "policy" / "model.safetensors").is_file()

    _, stages = load_pipeline(str(recipe), [f"folder={tmp_path / 'run'}", *changed])
    settings = stages["ppo"]
    assert isinstance(settings, PpoConfig)
    backbone = load_backbone(assemble.learning_model(settings))
    _, learned = assemble_rewards.build_rewards(settings, backbone, assemble.build_template(settings.model))
    (reward_model,) = learned.values()
    assemble.build_role(backbone, "policy", None, seed=1)
    assert reward_model.backbone is not backbone
    assert not any(parameter.requires_grad for parameter in reward_model.backbone.model.parameters())
