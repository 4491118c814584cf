"""The best of several answers, through the commands on a model of two layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dressage import assemble
from dressage.algorithms.selection import best_of_n_kl
from dressage.errors import ConfigError
from dressage.models.files import load_backbone
from dressage.recipe import load_stage
from dressage.rollout.native import NativeEngine
from dressage.schema import Prompt, Reward, Rollout, Sampling
from dressage.serving.chat import BestOf
from dressage.settings import ModelConfig

NAMES = ["Ann", "Ben", "Cem"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with rankings.jsonl and a reward model on the tiny model."""
    from typer.testing import CliRunner

    from dressage.cli import app

    folder = tmp_path_factory.mktemp("best_of")
    rows = [{"prompt": f"Who is {name}?", "chosen": f"{name} is a friend.", "rejected": "No."} for name in NAMES]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = ["reward", f"model.name={tiny_model}", f'data.sources=["{folder / "rankings.jsonl"}"]', "depth=1"]
    asked += ["data.heldout_fraction=0", "lora.rank=2", "training.steps=1", "--out", str(folder / "reward")]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code == 0, ran.output
    return folder


@pytest.fixture
def answers(dressage: Callable[..., Any], made: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    """The lines of answers.jsonl that `dressage sample` writes with these settings, and its folder."""

    def sample(name: str, *settings: str) -> tuple[list[Any], Path]:
        asked = [f"model.name={tiny_model}", f'prompts.sources=["{made / "rankings.jsonl"}"]', "max_new_tokens=6"]
        ran = dressage("sample", "sample", *asked, *settings, "--out", tmp_path / name)
        assert ran.exit_code == 0, ran.output + repr(ran.exception)
        lines = (tmp_path / name / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines], tmp_path / name

    return sample


def test_the_best_of_each_three_is_kept(answers: Callable[..., Any], made: Path) -> None:
    """Six answers with their scores; of the first three and of the last three to a prompt the better one."""
    judge = f"reward_model={made / 'reward' / 'reward'}"
    every, _ = answers("every", judge, "answers_per_prompt=6")
    best, folder = answers("best", judge, "answers_per_prompt=2", "best_of=3")
    assert len(every) == len(best) == len(NAMES)
    for all_six, two in zip(every, best, strict=True):
        six = all_six["answers"]
        assert two["answers"] == [max(part, key=lambda answer: answer["score"]) for part in (six[:3], six[3:])]
        assert two["sampling"]["best_of"] == 3
        assert two["sampling"]["kl_bound_per_answer"] == pytest.approx(best_of_n_kl(3))
    assert len({answer["score"] for line in every for answer in line["answers"]}) > 3
    curve = json.loads((folder / "best_of.json").read_text())["curve"]
    assert [point["n"] for point in curve] == [1, 2, 4, 6]
    scores = [[answer["score"] for answer in line["answers"]] for line in every]
    assert curve[0]["score"] == pytest.approx(sum(map(sum, scores)) / 18, abs=1e-5)
    assert curve[-1]["score"] == pytest.approx(sum(map(max, scores)) / 3, abs=1e-5)
    assert curve[0]["kl_bound_per_answer"] == 0


def test_the_best_of_one_is_sampling(answers: Callable[..., Any], made: Path) -> None:
    plain, folder = answers("plain", "answers_per_prompt=2")
    judged, _ = answers("judged", "answers_per_prompt=2", "best_of=1", f"reward_model={made / 'reward' / 'reward'}")
    assert not (folder / "best_of.json").exists() and "best_of" not in plain[0]["sampling"]
    for one, other in zip(plain, judged, strict=True):
        assert one["answers"] == [{k: v for k, v in a.items() if k != "score"} for a in other["answers"]]


def test_a_dry_run_counts_every_answer_sampled(dressage: Callable[..., Any], made: Path, tiny_model: Path) -> None:
    asked = ["sample", "best_of_n", f"model.name={tiny_model}", f'prompts.sources=["{made / "rankings.jsonl"}"]']
    ran = dressage(*asked, f"reward_model={made / 'reward' / 'reward'}", "--dry-run")
    assert ran.exit_code == 0, ran.output
    assert "3 prompts x 8 answers = 24 answers of which the best of every 8 is kept" in ran.stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["reward_model=null"], "best_of=8 needs reward_model"),
        (["temperature=0"], "best_of=8 with temperature=0"),
        (["measure_kl=true"], "measure_kl .* best_of=8"),
    ],
)
def test_contradictions_are_named(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_stage("sample", "best_of_n", settings)


# --- in a conversation


class Judge:
    """Likes small tokens."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        return [Reward(-float(sum(rollout.completion.tokens))) for rollout in rollouts]


def test_in_a_conversation_the_best_is_heard(tiny_model: Path) -> None:
    model = ModelConfig(name=str(tiny_model))
    template = assemble.build_template(model)
    engine = NativeEngine(
        load_backbone(model).model, stop_tokens=template.stop_tokens, pad_token=template.pad_token, max_batch=2
    )
    prompt, sampling = template.encode_prompt(Prompt.of("Who is Ann?")), Sampling(6, seed=4)
    every, screen = engine.generate([prompt] * 5, sampling), StringIO()
    for count in (1, 5):
        heard = list(BestOf(engine, Judge(), template, count, Console(file=screen)).stream(prompt, sampling))
        assert heard == list(min((answer.tokens for answer in every[:count]), key=sum))
    assert heard != list(engine.stream(prompt, sampling)) and "the best of 5" in screen.getvalue()


def test_chat_says_what_it_needs(dressage: Callable[..., Any], tiny_model: Path) -> None:
    ran = dressage("chat", tiny_model, "--best-of", 4)
    assert ran.exit_code == 2 and "--best-of 4 needs --reward-model" in ran.stderr
