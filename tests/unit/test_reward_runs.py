"""Rewards of parts inside whole runs of a model of two layers: what fails is counted, told, and ends nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dressage.config import PpoConfig
from dressage.errors import ConfigError
from dressage.monitor.health import verdicts
from dressage.monitor.metrics import declared, metric
from dressage.monitor.writers import read_metrics
from dressage.pipeline import inputs_of
from dressage.recipe import load_stage
from dressage.training.online import online_algorithm

Command = Callable[..., Any]
FUNCTIONS = """
import time

CALLS = 0

def raising_later(answers, **_):
    global CALLS
    CALLS += 1
    if CALLS == 2:
        raise RuntimeError("the second time")
    return [len(answer) for answer in answers]

def hanging_on_many(answers, **_):
    if len(answers) > 2:
        time.sleep(600)
    return [1.0] * len(answers)

def nan_on_many(answers, **_):
    return [float("nan") if n > 2 else 1.0 for n, _ in enumerate(answers)]

def wrong(answers):
    return [1.0] * len(answers)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with sums.jsonl, mine.py and two reward models on the tiny model."""
    from typer.testing import CliRunner

    from dressage.cli import app

    folder = tmp_path_factory.mktemp("rewards")
    sums = [{"question": f"What is {n} + {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(8)]
    ranked = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "No."} for row in sums]
    for name, lines in {"sums.jsonl": sums, "rankings.jsonl": ranked}.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "mine.py").write_text(FUNCTIONS, encoding="utf-8")
    for seed in (1, 2):
        asked = ["reward", f"model.name={tiny_model}", f'data.sources=["{folder / "rankings.jsonl"}"]', "lora.rank=2"]
        asked += ["training.steps=2", f"seed={seed}", "--out", str(folder / f"reward{seed}")]
        assert CliRunner().invoke(app, asked).exit_code == 0
    return folder


@pytest.fixture
def rl(dressage: Command, made: Path, tiny_model: Path, tmp_path: Path) -> Command:
    """`rl("rewards.right={type: number}")`: a run of two rounds of eight answers, into tmp_path/run."""
    settings = [
        f"model.name={tiny_model}",
        f'prompts.sources=["{made / "sums.jsonl"}"]',
        "prompts.heldout_fraction=0",
        "algorithm=grpo",
        "lora={rank: 2, alpha: 4}",
        "rollout={prompts_per_step: 2, answers_per_prompt: 4, max_new_tokens: 8}",
        "training={steps: 2, micro_batch_tokens: 256}",
    ]
    return lambda *more: dressage("ppo", *settings, *more, "--out", tmp_path / "run")


def test_parts_are_weighed_and_logged_by_name(rl: Command, made: Path, tmp_path: Path) -> None:
    ran = rl(
        "rewards.right={type: number, weight: 2}",
        "rewards.form={type: pattern, pattern: '[a-z]', weight: 0.5}",
        "rewards.short={type: length, high: 3, unit: characters}",
        f"rewards.learned={{type: ensemble, folders: [{made}/reward1/reward, {made}/reward2/reward], weight: 0.1}}",
        f"rewards.mine={{type: function, function: '{made}/mine.py:nan_on_many', weight: 0}}",
        "gold=mine",
        "score_clip=100",
    )
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    for row in read_metrics(tmp_path / "run"):
        part = {name.removeprefix("reward/part/"): row[name] for name in row if name.startswith("reward/part/")}
        assert part.keys() == {"right", "form", "short", "learned", "mine"} and 0 <= part["form"] <= 1
        total = 2 * part["right"] + 0.5 * part["form"] + part["short"] + 0.1 * part["learned"]
        assert row["reward/score_mean"] == pytest.approx(total, abs=1e-5)
        assert row["reward/failed_share"] == 5 / 8 and part["mine"] == 3 / 8  # NaN from the fourth answer on
        assert row["gold/mean"] == part["mine"]
    assert "reward/part/right" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "failed", "why"),
    [
        ("raising_later", [0.0, 1.0], "RuntimeError: the second time (mine.py:10)"),
        ("hanging_on_many", [1.0, 1.0], "gave no answer in 0.5 s"),
        ("nan_on_many", [0.625, 0.625], "gave nan, which is no finite number"),
    ],
)
def test_a_function_that_fails_does_not_end_the_run(
    name: str, failed: list[float], why: str, rl: Command, made: Path, tmp_path: Path
) -> None:
    part = f"{{type: function, function: '{made}/mine.py:{name}', timeout_seconds: 0.5, on_failure: -2}}"
    ran = rl(f"rewards.mine={part}", "score_clip=null")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    rows = read_metrics(tmp_path / "run")
    assert [row["reward/failed_share"] for row in rows] == failed
    assert all(math.isfinite(row["loss/policy"]) for row in rows)
    assert rows[1]["reward/score_mean"] == pytest.approx(-2 * failed[1] + (1 - failed[1]))
    (said,) = [line for line in ran.stderr.splitlines() if line.startswith("warning: rewards.mine:")]
    assert why in said and "of 8 answers score -2 there instead" in said
    (found,) = [one for one in verdicts("ppo", rows) if one.metric == "reward/failed_share"]
    assert found.level in ("warn", "stop") and "met a part that failed" in found.reason


def test_a_judge_on_the_tiny_model(rl: Command, tiny_model: Path, tmp_path: Path) -> None:
    """It speaks noise, so no verdict is one: all in the middle, which is told."""
    ran = rl(f"rewards.kind={{type: judge, model: {{name: {tiny_model}}}, max_new_tokens: 2}}", "training.steps=1")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    (row,) = read_metrics(tmp_path / "run")
    assert row["reward/score_mean"] == pytest.approx(0.5, abs=0.5) and row["reward/failed_share"] == 0
    assert "name no grade; they count as the middle" in ran.stderr


def test_a_critic_begins_from_a_part(rl: Command, made: Path, tmp_path: Path) -> None:
    model = f"rewards.learned={{type: model, folder: {made}/reward1/reward}}"
    ran = rl(model, "rewards.right={type: number}", "algorithm=ppo", "training.steps=1")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    assert (tmp_path / "run" / "value").is_dir()


def test_short_and_long_form_are_one(rl: Command, made: Path, tmp_path: Path) -> None:
    from dressage.models.files import load_tensors, weights_hash

    hashes, logged = [], []
    for form in (
        f"reward_model={made}/reward1/reward",
        f"rewards.model={{type: model, folder: {made}/reward1/reward}}",
    ):
        assert rl(form).exit_code == 0
        hashes.append(weights_hash(load_tensors(tmp_path / "run" / "policy" / "adapter_model.safetensors")))
        logged.append([row["reward/score_mean"] for row in read_metrics(tmp_path / "run")])
    assert hashes[0] == hashes[1] and logged[0] == logged[1]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([], "error: command line: set either reward_model (a folder) or rewards (named parts)"),
        (
            ["reward_model=x", "rewards.a={type: number}"],
            "error: command line: set either reward_model (a folder) or rewards (named parts)",
        ),
        (["rewards.a={type: nmber}"], "error: command line: rewards.a.type: 'nmber' is none of model, ensemble,"),
        (["rewards.a={weight: 2}"], "error: command line: rewards.a.type: must be set: one of model, ensemble,"),
        (
            ["rewards.a={type: number, wieght: 2}"],
            "error: command line: rewards.a.wieght: unknown setting; did you mean weight?",
        ),
        (
            ["rewards.a={type: pattern, pattern: '('}"],
            "error: command line: rewards.a.pattern: not a regular expression: missing )",
        ),
        (["rewards.a={type: length, low: 4, high: 3}"], "error: command line: rewards.a: low=4 is above high=3"),
        (["rewards.a={type: remote, url: 'file:///etc/hosts'}"], "error: command line: rewards.a.url: "),
        (["rewards.a={type: remote, url: 'http://me:pw@host/'}"], "error: command line: rewards.a.url: "),
        (
            ["rewards.a={type: number}", "algorithm=ppo"],
            'error: value.start="reward" begins the critic as a reward model, and rewards has no part of type model',
        ),
        (
            ["rewards.a={type: function, function: 'MADE/mine.py:wrong'}"],
            "error: rewards.a: tried on two made-up answers: MADE/mine.py:wrong: TypeError: wrong() got an unexpected"
            " keyword argument 'prompts'; mend it and give the command again",
        ),
        (
            ["rewards.a={type: function, function: 'no.such:thing'}"],
            "error: rewards.a: tried on two made-up answers: no.such:thing: ModuleNotFoundError: No module named 'no'",
        ),
        (
            ["rewards.a={type: remote, url: 'http://127.0.0.1:9/', timeout_seconds: 0.2}"],
            "error: rewards.a: tried on two made-up answers: 127.0.0.1:9/: ",
        ),
        (
            ["rewards.a={type: judge, url: 'http://127.0.0.1:9/', key_variable: NO_SUCH_KEY}"],
            "error: rewards.a: key_variable=NO_SUCH_KEY: no such environment variable",
        ),
        (
            ["rewards.a={type: exact}", 'prompts.sources=["MADE/rankings.jsonl"]'],
            "error: MADE/rankings.jsonl: 8 of 8 prompts have no target, with which rewards.a (type exact) compares",
        ),
        (
            ["rewards.a={type: number}", "gold=a"],  # it would be learnt from
            'error: command line: gold="a": give "simulated", or the name of a part of rewards with weight: 0',
        ),
        (["rewards.a={type: number}", "gold=simulted"], 'error: command line: gold="simulted": give "simulated"'),
        (["rewards.a={type: model, folder: nowhere}"], "error: nowhere: no reward model here (no role.json)"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_work_is_refused(
    settings: list[str], line: str, dry: bool, rl: Command, made: Path, tmp_path: Path
) -> None:
    if dry and "nowhere" in line:
        pytest.skip("a dry run says it in words of its own")
    ran = rl(*(text.replace("MADE", str(made)) for text in settings), *(["--dry-run"] if dry else []))
    assert ran.exit_code == 2, ran.output + repr(ran.exception)
    assert line.replace("MADE", str(made)) in ran.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_learned_judges_alone(rl: Command, made: Path) -> None:
    ran = rl("rewards.right={type: number}", "--dry-run")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    assert "8 prompts" in ran.output


def test_a_changed_function_is_another_input(made: Path, tmp_path: Path) -> None:
    part = f"rewards.a={{type: function, function: '{made}/mine.py:wrong'}}"
    config = load_stage("ppo", None, [f'prompts.sources=["{made / "sums.jsonl"}"]', part])
    assert str(made / "mine.py") in inputs_of(config)


def test_gsm8k_recipe(dressage: Command, made: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Its system turn tells the form that its pattern rewards, and it runs."""
    import re

    config = load_stage("ppo", "grpo_gsm8k")
    assert isinstance(config, PpoConfig) and online_algorithm(config) is not None
    form = config.parts["form"]
    assert form.type == "pattern" and re.search(form.pattern, config.model.system or "", re.MULTILINE)
    assert re.search(form.pattern, "So 5 - 3 = 2.\n#### $1,200.50\n", re.MULTILINE)
    assert not re.search(form.pattern, "#### 5\nIs that right?", re.MULTILINE)
    settings = [f"model={{name: {tiny_model}}}", f'prompts.sources=["{made / "sums.jsonl"}"]', "minibatch_size=null"]
    settings += ["lora={rank: 2, layers: 1}", "rollout={prompts_per_step: 2, answers_per_prompt: 2, max_new_tokens: 8}"]
    ran = dressage("rl", "grpo_gsm8k", *settings, "training.steps=1", "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)


def test_parts_and_failures_are_explained() -> None:
    assert declared("reward/part/right") and declared("reward/failed_share") and not declared("reward/parts")
    assert "'right'" in metric("reward/part/right").meaning


def test_value_zero_needs_no_reward_model(made: Path) -> None:
    settings = [f'prompts.sources=["{made / "sums.jsonl"}"]', "rewards.a={type: number}"]
    start = load_stage("ppo", None, [*settings, "value.start=zero"])
    assert isinstance(start, PpoConfig) and online_algorithm(start)
    with pytest.raises(ConfigError, match=r"value\.start"):
        online_algorithm(load_stage("ppo", None, settings))  # type: ignore[arg-type]


def test_real_gsm8k_rows_have_numbers_for_targets(shared_data: Path) -> None:
    from dressage.data.sources import read_prompts
    from dressage.rewards.verifiers import final, last_number, number

    for name, rows in {"gsm8k_train.shared.jsonl.gz": 2500, "gsm8k_test.shared.jsonl": 1051}.items():
        prompts = read_prompts(str(shared_data / "verifiable" / name)).records
        assert len(prompts) == rows
        for prompt in prompts:
            assert prompt.target is not None
            assert last_number(final(prompt.target)) == int(prompt.target.rpartition("#### ")[2].replace(",", ""))
            assert number(prompt.target, prompt.target)


def test_real_solutions_are_judged_as_their_labels_say(shared_data: Path) -> None:
    """Of four models, right or wrong by OpenAI's own word: the last number agrees with it."""
    import gzip

    from dressage.rewards.verifiers import number

    agree = []
    path = shared_data / "kwise" / "gsm8k_example_model_solutions.shared.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            for solver in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
                said = number(row[solver]["solution"], row["ground_truth"])
                agree.append(said == row[solver]["is_correct"])
    assert len(agree) == 2400 and sum(agree) / len(agree) > 0.99
