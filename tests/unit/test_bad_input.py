"""Whatever a user gets wrong: a line or two on stderr that name it, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
Write = Callable[..., Path]

GOOD = [{"prompt": f"How are you, {name}?", "completion": "Well, thank you."} for name in ("Ann", "Ben", "Cem", "Dao")]


def refused(ran: Any, *words: str) -> None:
    """Exit code 2, and one or two lines that begin with "error:" and hold every one of these words."""
    assert ran.exit_code == 2, ran.output
    lines = ran.stderr.splitlines()
    assert 1 <= len(lines) <= 2 and all(line.startswith("error: ") for line in lines), ran.stderr
    assert "Traceback" not in ran.output
    for word in words:
        assert word in ran.stderr, ran.stderr


@pytest.fixture
def sft(dressage: Command, tiny_model: Path, tmp_path: Path) -> Command:
    """`sft(data, "more=settings")`: learn these demonstrations, in tmp_path/out."""

    def run(data: object, *more: str) -> Any:
        settings = [f"model.name={tiny_model}", f'data.sources=["{data}"]', "training.batch_size=2", *more]
        return dressage("sft", *settings, "--out", tmp_path / "out")

    return run


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "Hello", "completion": ', ["data.jsonl:3", "not valid JSON", "on_bad_row"]),
        ({"prompt": "Hello", "completion": ""}, ["data.jsonl:3", "empty"]),
        ({"prompt": "Hello", "completion": 7}, ["data.jsonl:3"]),
        ({"prompt": "Hello"}, ["data.jsonl:3", "completion"]),
        ("[1, 2]", ["data.jsonl:3"]),
    ],
)
def test_a_bad_row_is_named(sft: Command, write_rows: Write, tmp_path: Path, row: object, words: list[str]) -> None:
    refused(sft(write_rows("data.jsonl", [*GOOD[:2], row, *GOOD[2:]])), *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_file(sft: Command, tmp_path: Path) -> None:
    refused(sft(tmp_path / "absent.jsonl"), "absent.jsonl", "no such file")
    assert not (tmp_path / "out").exists()


def test_unknown_columns_with_the_nearest_format(sft: Command, write_rows: Write) -> None:
    refused(sft(write_rows("data.jsonl", [{"promt": "Hello", "answer": "Yes"}])), "data.jsonl", "promt", "needs")


def test_a_record_over_the_limit(sft: Command, write_rows: Write, tmp_path: Path) -> None:
    long = {"prompt": "why " * 100, "completion": "Because."}
    ran = sft(write_rows("data.jsonl", [*GOOD, long]), "data.max_tokens=100", "data.on_too_long=error")
    refused(ran, "prompt too long", "why why", "100 tokens")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_to_learn_from(sft: Command, write_rows: Write, tmp_path: Path) -> None:
    refused(sft(write_rows("data.jsonl", GOOD), "data.max_tokens=3"), "no row is left", "too long")
    assert not (tmp_path / "out").exists()


def test_a_file_that_ends_too_early(sft: Command, tmp_path: Path) -> None:
    (tmp_path / "half.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03half of it")
    refused(sft(tmp_path / "half.jsonl.gz"), "half.jsonl.gz", "damaged")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "settings", "words"),
    [
        ("sft", ["training.epocs=2"], ["training.epocs", "did you mean epochs?"]),
        ("sft", ["lora.ranc=2"], ["lora.ranc", "did you mean rank?"]),
        ("sft", ["training.batch_size=0"], ["training.batch_size", "greater than or equal to 1", "got 0"]),
        ("sft", ["training.batch_size=many"], ["training.batch_size", "integer", "'many'"]),
        ("sft", ["optimizer.schedule=sine"], ["optimizer.schedule", "'cosine'"]),
        ("sft", ["data=null"], ["data"]),
        ("sft", ["model.dtype=float8"], ["model.dtype"]),
        ("sft", ["training.epochs"], ["training.epochs", "section.setting=value"]),
        ("sft", ["data.sources=[a"], ["not valid YAML"]),
        ("sft", ["kind=ppo"], ["dressage ppo"]),
        ("reward", ["lora.dropout=0.1"], ["lora.dropout"]),
        ("ppo", ["minibatch_size=7"], ["minibatch_size=7", "rollout.prompts_per_step", "24"]),
        ("ppo", ["settings.ptx_coef=0.1"], ["settings.ptx_coef", "ptx.data"]),
        ("ppo", ["lora=null", "value.start=base"], ["value.start", "value.model"]),
        ("ppo", ["rollout.top_p=0.9"], ["top_p", "allow_filtered_sampling"]),
        ("ppo", ["kl.low_per_answer=20"], ["low_per_answer", "high_per_answer"]),
        ("rank", ["rankings=mine.jsonl"], ["answers", "rankings"]),
        ("evaluate", ["judge=reward", "reward_model=null"], ["judge=reward", "reward_model"]),
    ],
)
def test_a_setting_is_named(
    dressage: Command, tmp_path: Path, verb: str, settings: list[str], words: list[str]
) -> None:
    refused(dressage(verb, verb, *settings, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("data: {sources: [a.jsonl]\ntraining: {epochs: 2}", ["recipe.yaml:2", "not valid YAML"]),
        ("- data", ["recipe.yaml", "mapping"]),
        ("extends: nowhere", ["nowhere", "no such recipe"]),
        ("extends: recipe.yaml", ["recipe.yaml", "extends itself"]),
        ("{}", ["data", "must be set"]),
    ],
)
def test_a_broken_recipe(dressage: Command, tmp_path: Path, recipe: str, words: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    refused(dressage("sft", tmp_path / "recipe.yaml", "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_recipes_that_are_not_there_or_for_another_verb(dressage: Command, tmp_path: Path) -> None:
    refused(dressage("sft", "sfd"), "sfd", "did you mean sft?")
    refused(dressage("run", tmp_path / "absent.yaml"), "absent.yaml", "dressage recipes")
    refused(dressage("run", "sft"), "has no stages", "dressage sft")
    refused(dressage("sft", "quickstart"), "dressage run quickstart")
    refused(dressage("recipes", "quickstat"), "did you mean quickstart?")


def test_a_stage_that_reads_what_no_stage_makes(dressage: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('stages:\n  rank: {answers: "stage:sampels/answers.jsonl"}\n', encoding="utf-8")
    refused(dressage("run", recipe, "--out", tmp_path / "out"), "stages.rank", "stage:sampels/answers.jsonl")
    recipe.write_text("stages:\n  rnk: {answers: a.jsonl}\n", encoding="utf-8")
    refused(dressage("run", recipe, "--out", tmp_path / "out"), "stages.rnk", "'rnk'", "rank")
    assert not (tmp_path / "out").exists()


# --- models and their files -------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(sft: Command, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows("data.jsonl", GOOD)
    refused(sft(data, f"model.name={tmp_path}/absent"), "absent", "no such model folder")
    (tmp_path / "empty").mkdir()
    refused(sft(data, f"model.name={tmp_path}/empty"), "empty", "holds no model")
    refused(sft(data, "model.name=nobody/has-this-model"), "nobody/has-this-model")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(sft: Command, write_rows: Write, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(tiny_model, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(sft(write_rows("data.jsonl", GOOD), f"model.name={folder}"), "pickled", "safetensors", "save_pretrained")
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter(dressage: Command, sft: Command, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows("data.jsonl", GOOD)
    assert sft(data, "training.steps=1").exit_code == 0
    policy = tmp_path / "out" / "policy"
    weights = policy / "adapter_model.safetensors"
    asked = ["sample", f"model.name={policy}", f'prompts.sources=["{data}"]', "max_new_tokens=2", "--out"]
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    refused(dressage(*asked, tmp_path / "half"), str(weights), "damaged")
    weights.unlink()
    refused(dressage(*asked, tmp_path / "half"), str(weights), "missing")
    weights.write_bytes(whole)
    (policy / "adapter_config.json").write_text("{", encoding="utf-8")
    refused(dressage(*asked, tmp_path / "half"), "adapter_config.json")
    assert not (tmp_path / "half").exists()


def test_a_policy_is_no_reward_model(dressage: Command, sft: Command, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows("data.jsonl", GOOD)
    assert sft(data, "training.steps=1").exit_code == 0
    policy = tmp_path / "out" / "policy"
    asked = [
        "ppo",
        f"model.name={policy}",
        f'prompts.sources=["{data}"]',
        "training.steps=1",
        "--out",
        tmp_path / "ppo",
    ]
    refused(dressage(*asked, f"reward_model={policy}"), "is a policy, not a reward model")
    refused(dressage(*asked, f"reward_model={tmp_path}/absent"), "no reward model here", "dressage reward")
    assert not (tmp_path / "ppo").exists()


def test_answers_to_other_prompts_are_not_compared(
    dressage: Command, write_rows: Write, tiny_model: Path, tmp_path: Path
) -> None:
    def answers(question: str) -> dict[str, object]:
        answer = {"text": "Yes.", "tokens": 5, "finish": "stop"}
        return {"prompt": [{"role": "user", "content": question}], "prompt_id": "", "answers": [answer]}

    one, other = write_rows("one.jsonl", [answers("Is it?")]), write_rows("other.jsonl", [answers("Was it?")])
    asked = ["evaluate", f"model.name={tiny_model}", f"before={one}", "--out", tmp_path / "out"]
    refused(dressage(*asked, f"after={other}"), "one.jsonl", "other.jsonl", "same prompts")
    refused(dressage(*asked, f"after={tmp_path}/absent.jsonl"), "absent.jsonl", "dressage sample")
    refused(dressage(*asked, f"after={write_rows('bad.jsonl', ['{}'])}"), "bad.jsonl:1", "dressage sample")
    assert not (tmp_path / "out").exists()


# --- the folder and its disk ------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(sft: Command, write_rows: Write, tmp_path: Path) -> None:
    from dressage.pipeline import locked

    data = write_rows("data.jsonl", GOOD)
    with locked(tmp_path / "out"):
        refused(sft(data, "training.steps=1"), str(tmp_path / "out"), "another run")
    assert sft(data, "training.steps=1").exit_code == 0


def test_a_file_stands_where_the_folder_should(sft: Command, write_rows: Write, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    refused(sft(write_rows("data.jsonl", GOOD)), str(tmp_path / "out"), "cannot be written")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes, which a checkpoint of a large adapter fills more than half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(
    dressage: Command, write_rows: Write, tiny_model: Path, small_disk: Path
) -> None:
    asked = ["sft", f"model.name={tiny_model}", f'data.sources=["{write_rows("data.jsonl", GOOD)}"]', "lora.rank=128"]
    asked += ["training.steps=3", "training.checkpoint_every=1", "training.keep_checkpoints=1", "training.batch_size=2"]
    refused(dressage(*asked, "--out", small_disk / "out"), "step-000002", "No space left", "stays")
    checkpoints = small_disk / "out" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000001"]
    assert json.loads((small_disk / "out" / "stage.json").read_text())["status"] == "interrupted"

    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    ran = dressage(*asked, "--out", small_disk / "out")
    assert ran.exit_code == 0 and re.search(r"sft\s+3/3", ran.stdout) and not re.search(r"sft\s+1/3", ran.stdout)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000003"]
