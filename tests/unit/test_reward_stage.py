"""The verb reward: what it learns from, in what ways, on which models."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from dressage.assemble import build_rows, build_template
from dressage.config import DataConfig
from dressage.data.merge import merged, standardised
from dressage.data.prepare import EncodedRanking
from dressage.data.template import Encoded
from dressage.errors import ConfigError, DataError
from dressage.models.files import load_reward_model
from dressage.monitor.writers import read_metrics
from dressage.rewards.learned import score_rows
from dressage.schema import Prompt, Ranking
from dressage.settings import ModelConfig

Command = Callable[..., Any]
Write = Callable[..., Path]
NAMES = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea"]


def small(model: Path, data: Path) -> list[str]:
    """Settings that make the stage take a second."""
    return [
        f"model.name={model}",
        f'data.sources=["{data}"]',
        "data.heldout_fraction=0.34",
        "lora={rank: 4, alpha: 8}",
        "optimizer.learning_rate=1e-2",
        "training={epochs: 1, steps: 12, batch_size: 4, micro_batch_tokens: 512}",
    ]


def ranked() -> list[dict[str, Any]]:
    """To each of 12 people a friendly answer, a short one and a rude one."""
    return [
        {
            "prompt": f"Who is {name}?",
            "answers": [f"{name} is a friend.", "A friend.", "No!!"],
            "ranks": [0, 1, 2],
            "grades": [9, 6, 1],
        }
        for name in NAMES
    ]


# --- many judgements of one prompt ------------------------------------------------------------------------------------


def test_judgements_are_merged_by_hand() -> None:
    """x won 3 of 4 against y, and nobody met z but y, once: grades as the log-odds say, shrunk by the prior."""
    prompt, other = Prompt.of("a"), Prompt.of("b")
    judged = [Ranking.of_pair(prompt, "x", "y")] * 3 + [Ranking.of_pair(prompt, "y", "x")]
    found = merged([*judged, Ranking(other, ("p", "q"), (0, 0)), *judged * 50], "bradley_terry")
    assert [one.prompt for one in found] == [prompt, other]
    assert found[0].answers == ("x", "y") and found[0].ranks == (0, 1)
    assert found[0].grades[0] - found[0].grades[1] == pytest.approx(math.log(3), abs=0.02)
    assert found[1].ranks == (0, 0) and found[1].grades == (0.0, 0.0)
    assert merged([Ranking(prompt, ("x", "y"), (0, 1), (True, False))], "elo")[0].finished == (True, False)


@pytest.mark.parametrize("by", ["bradley_terry", "elo"])
def test_noise_of_many_judges_averages_out(by: Any) -> None:
    """Judges who err one time in five: each ranking alone is often wrong, what they come to is not."""
    chance, answers = random.Random(0), ("best", "good", "poor", "bad")
    rankings = []
    for _ in range(400):
        i, j = sorted(chance.sample(range(4), 2))
        ranks = (0, 1) if chance.random() < 0.8 else (1, 0)
        rankings.append(Ranking(Prompt.of("q"), (answers[i], answers[j]), ranks))
    (one,) = merged(rankings, by)
    assert sorted(zip(one.ranks, one.answers, strict=True)) == list(enumerate(answers))


def test_the_same_judgement_twice_counts_twice_when_merged(tiny_model: Path, write_rows: Write) -> None:
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    path = write_rows("rankings.jsonl", [row, row, {"prompt": "a", "chosen": "y", "rejected": "x"}])
    data = DataConfig(sources=(str(path),), heldout_fraction=0.0)
    template = build_template(ModelConfig(name=str(tiny_model)))
    assert len(build_rows("rankings", data, template, 1).train) == 2
    rows = build_rows("rankings", data.model_copy(update={"merge": "bradley_terry"}), template, 1)
    assert len(rows.train) == 1 and rows.train[0].ranks == (0, 1)
    assert "merged: 3 rankings of 1 prompts" in rows.notes
    with pytest.raises(ConfigError, match=r"data\.merge=bradley_terry: only rankings"):
        build_rows("prompts", data.model_copy(update={"merge": "bradley_terry"}), template, 1)


def test_grades_are_standardised_by_what_is_learnt_from() -> None:
    text = Encoded((1, 2), (False, True))
    rows = [EncodedRanking((text, text), (0, 1), (3.0, 1.0)), EncodedRanking((text, text), (1, 0), (1.0, 3.0))]
    train, heldout = standardised(rows, [EncodedRanking((text, text), (0, 1), (5.0, 2.0))])
    assert [row.grades for row in train] == [(1.0, -1.0), (-1.0, 1.0)]
    assert heldout[0].grades == (3.0, 0.0)
    with pytest.raises(DataError, match=r"1 rankings have no grades.*data\.merge"):
        standardised(rows, [EncodedRanking((text, text), (0, 1))])
    with pytest.raises(DataError, match="same grade"):
        standardised([EncodedRanking((text, text), (0, 0), (1.0, 1.0))], [])


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        ["loss=log_exp", "settings={margin: 0.2, ties: half}"],
        ["loss=regression"],
        ["loss=regression", "data.merge=bradley_terry"],
        ["data.merge=elo", "settings={margin: 1, ties: rao_kupper}"],
    ],
)
def test_each_way_of_learning_rankings(
    changes: list[str], dressage: Command, tiny_model: Path, write_rows: Write, tmp_path: Path
) -> None:
    asked = [*small(tiny_model, write_rows("rankings.jsonl", ranked())), *changes]
    ran = dressage("reward", *asked, "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    logged = read_metrics(tmp_path / "run")
    assert logged[-1]["loss/heldout"] < 0.8 * logged[0]["loss/heldout"]
    assert json.loads((tmp_path / "run" / "accuracy.json").read_text())["accuracy"] > 0.8
    dry = dressage("reward", *asked, "--dry-run")
    assert dry.exit_code == 0 and "of 3.0 answers" in dry.stdout, dry.output


@pytest.mark.parametrize("lora", ["{rank: 2, alpha: 8}", "null"])
def test_a_reward_model_goes_on_from_another(
    lora: str, dressage: Command, tiny_model: Path, write_rows: Write, tmp_path: Path
) -> None:
    """Pretrained on preferences: what it starts with is what the other one ended with, and it keeps the language."""
    data = write_rows("rankings.jsonl", ranked())
    asked = [*small(tiny_model, data), f"lora={lora}", "optimizer.learning_rate=3e-3"]
    first = [*asked, "settings={lm_coef: 0.5}", "--out", tmp_path / "pmp"]
    assert (ran := dressage("reward", *first)).exit_code == 0, ran.output + repr(ran.exception)
    again = [*asked, f"start={tmp_path / 'pmp' / 'reward'}", "optimizer.learning_rate=0", "--out", tmp_path / "same"]
    assert (ran := dressage("reward", *again)).exit_code == 0, ran.output + repr(ran.exception)
    weights = "model.safetensors" if lora == "null" else "adapter_model.safetensors"
    one, other = ((tmp_path / name / "reward" / weights).read_bytes() for name in ("pmp", "same"))
    assert one == other
    roles = [load_reward_model(tmp_path / name / "reward") for name in ("pmp", "same")]
    rows = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert_close(score_rows(roles[0], rows), score_rows(roles[1], rows), rtol=0, atol=1e-5)
    if lora != "null":
        for changes, message in [(["lora.rank=3"], "lora="), (["depth=1"], "depth=None"), (["lora=null"], "lora=")]:
            ran = dressage("reward", *again, *changes)
            assert ran.exit_code != 0 and message in ran.output, ran.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["settings.margni=1"], "margin"),
        (["settings.lm_coef=1", "depth=1"], r"settings\.lm_coef.*depth=1"),
        (["loss=regression", "settings.margin=1"], r"settings\.margin: unknown"),
    ],
)
def test_what_contradicts_is_refused(
    changes: list[str], message: str, dressage: Command, tiny_model: Path, write_rows: Write, tmp_path: Path
) -> None:
    asked = [*small(tiny_model, write_rows("rankings.jsonl", ranked())), *changes]
    for way in ([], ["--dry-run"]):
        ran = dressage("reward", *asked, "--out", tmp_path / "run", *way)
        assert ran.exit_code != 0
        assert re.search(message, ran.output), ran.output
