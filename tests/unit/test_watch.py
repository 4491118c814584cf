"""Alarms during training: what is said, when a run ends, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dressage.config import HealthConfig
from dressage.monitor.watch import Watch
from dressage.monitor.writers import read_metrics

Command = Callable[..., Any]
POLICY = Path("policy") / "adapter_model.safetensors"


def watch(**health: Any) -> Watch:
    return Watch("ppo", {"health": HealthConfig(**health).model_dump(), "rollout": {"max_new_tokens": 64}})


def seen(judge: Watch, name: str, values: list[float | None]) -> list[tuple[list[str], str | None]]:
    found = []
    for step, value in enumerate(values, start=1):
        worse, fatal = judge.see({"step": step, name: value})
        found.append(([verdict.level for verdict in worse], None if fatal is None else fatal.metric))
    return found


def test_an_alarm_is_told_once_and_ends_the_run_when_it_has_lasted() -> None:
    found = seen(watch(patience_steps=3), "entropy/per_token", [2.0, 0.05, 0.05, 0.05])
    # The recent quarter of up to four steps is the last one.
    assert found == [([], None), (["stop"], None), ([], None), ([], "entropy/per_token")]


def test_one_that_passes_ends_nothing() -> None:
    values = [2.0, 0.05, 0.05, 2.0, 0.05, 0.05, 2.0]
    assert all(fatal is None for _, fatal in seen(watch(patience_steps=3), "entropy/per_token", values))


def test_what_is_no_number_ends_the_run_at_once() -> None:
    assert seen(watch(), "reward/score_mean", [0.1, None])[-1] == (["stop"], "reward/score_mean")


def test_with_warn_nothing_ends() -> None:
    found = seen(watch(on_alarm="warn"), "reward/score_mean", [0.1, *[None] * 9])
    assert [level for level, _ in found] == [[], ["stop"], *[[]] * 8] and not any(fatal for _, fatal in found)


def test_bounds_are_the_runs_own() -> None:
    own = {"bounds": {"clip/share": (0.05, 0.1)}, "patience_steps": 1}
    assert seen(watch(**own), "clip/share", [0.01, 0.07, 0.2]) == [
        ([], None),
        (["warn"], None),
        (["stop"], "clip/share"),
    ]
    assert seen(watch(patience_steps=1), "clip/share", [0.01, 0.07, 0.2]) == [([], None)] * 3


def test_the_best_checkpoint_is_the_one_whose_answers_were_best() -> None:
    """Weights of step 2 write the answers of step 3."""
    judge = watch(on_alarm="rollback")
    for step, gold in enumerate([0.0, 0.1, 0.9, 0.5, 0.2], start=1):
        judge.see({"step": step, "gold/mean": gold})
    assert judge.best([1, 2, 3, 4]) == 2
    assert judge.best([3, 4]) == 3


def test_without_that_metric_it_is_the_newest_from_before_the_trouble() -> None:
    judge = watch(on_alarm="rollback", patience_steps=2)
    seen(judge, "entropy/per_token", [2.0, 2.0, 2.0, 0.05, 0.05])
    assert judge.best([1, 2, 3, 4, 5]) == 3
    assert judge.best([4, 5]) is None


@pytest.fixture(scope="module")
def sft_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [f'{{"prompt": "Say {n}.", "completion": "{n}!"}}\n' for n in range(24)]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def asked(tiny_model: Path, rows: Path) -> list[str]:
    return [
        f"model.name={tiny_model}",
        f'data.sources=["{rows}"]',
        "training={steps: 6, batch_size: 4, checkpoint_every: 1, keep_checkpoints: 9}",
    ]


ALWAYS = "health.bounds={gradient/norm: [0.1, 0.1]}"
"""Any pull at the weights is too strong."""


def test_a_stopped_run_says_why_keeps_its_checkpoint_and_goes_on_if_told_to(
    dressage: Command, tiny_model: Path, sft_rows: Path, tmp_path: Path
) -> None:
    settings = asked(tiny_model, sft_rows)
    plain, out = tmp_path / "plain", tmp_path / "run"
    assert dressage("sft", *settings, "--out", plain).exit_code == 0
    ran = dressage("sft", *settings, ALWAYS, "health.patience_steps=3", "--out", out)
    assert ran.exit_code == 3
    assert "sft: gradient/norm" in ran.stderr and "lower optimizer.learning_rate" in ran.stderr
    assert "stopped after step 3; the checkpoint of step 3 is whole" in ran.stderr
    assert not (out / "policy").exists() and len(read_metrics(out)) == len(read_metrics(plain)) - 3
    again = dressage("sft", *settings, ALWAYS, "health.patience_steps=3", "--out", out)
    assert again.exit_code == 3 and "stopped after step 4" in again.stderr
    ran = dressage("sft", *settings, ALWAYS, "health.on_alarm=warn", "--out", out)
    assert ran.exit_code == 0, ran.output
    assert (out / POLICY).read_bytes() == (plain / POLICY).read_bytes()


def test_a_run_is_rolled_back_to_its_best_checkpoint(
    dressage: Command, tiny_model: Path, sft_rows: Path, tmp_path: Path
) -> None:
    settings = asked(tiny_model, sft_rows)
    out = tmp_path / "run"
    rolled = [ALWAYS, "health.on_alarm=rollback", "health.patience_steps=4"]
    ran = dressage("sft", *settings, *rolled, "health.best_by=step", "--out", out)
    assert ran.exit_code == 0, ran.output
    # Measured by the step itself the last checkpoint that a step followed is the best.
    assert "rolled back to step 3" in ran.output


def test_bounds_of_what_is_not_judged_are_refused_before_anything_is_loaded(
    dressage: Command, tiny_model: Path, sft_rows: Path, tmp_path: Path
) -> None:
    ran = dressage("sft", *asked(tiny_model, sft_rows), "health.bounds={entropy: [1, 2]}", "--out", tmp_path / "run")
    assert ran.exit_code == 2 and "health.bounds.entropy" in ran.stderr and "entropy/per_token" in ran.stderr
