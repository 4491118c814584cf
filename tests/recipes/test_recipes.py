"""Every recipe that is shipped loads, says what it is for, and stands on files that are there."""

from __future__ import annotations

import pytest

from dressage.config import STAGE_KINDS, PipelineConfig
from dressage.material import path as material
from dressage.recipe import load_pipeline, load_stage, parse, read_yaml, recipes

RECIPES = recipes()


def texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def test_each_verb_has_a_recipe_to_begin_with() -> None:
    assert {"quickstart", *STAGE_KINDS} <= RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads(name: str) -> None:
    raw = read_yaml(name)
    if "stages" in raw:
        config, stages = load_pipeline(name)
        assert stages.keys() == config.stages.keys()
        description = config.description
    else:
        description = getattr(load_stage(raw["kind"], name), "description")  # noqa: B009
    assert 20 < len(description) < 120 and description.endswith(".")


@pytest.mark.parametrize("name", RECIPES)
def test_its_material_is_shipped(name: str) -> None:
    named = [text.removeprefix("material:") for text in texts(read_yaml(name)) if text.startswith("material:")]
    assert all(material(file).is_file() for file in named)


@pytest.mark.parametrize("name", STAGE_KINDS)
def test_a_starter_says_what_each_line_is_for(name: str) -> None:
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if line.strip() and "#" not in line]
    assert {line.split(":")[0].strip() for line in bare} <= {"kind", "description", "model", "data", "prompts"} | {
        "optimizer",
        "training",
        "rollout",
    }


def test_the_starters_fit_together() -> None:
    """What one makes is what the next one reads."""
    settings = {kind: load_stage(kind, kind).model_dump() for kind in STAGE_KINDS}
    assert settings["sample"]["model"]["name"] == settings["ppo"]["model"]["name"] == "runs/sft/policy"
    assert settings["rank"]["answers"] == "runs/sample/answers.jsonl"
    assert settings["reward"]["data"]["sources"] == ("runs/rank/rankings.jsonl",)
    assert settings["ppo"]["reward_model"] == settings["evaluate"]["reward_model"] == "runs/reward/reward"


def test_the_quickstart_takes_peoples_rankings() -> None:
    """As `dressage quickstart --rankings` changes it: nothing simulated is left."""
    people = ["stages.samples=null", "stages.rank.answers=null", "stages.rank.rankings=mine.jsonl"]
    config, stages = load_pipeline("quickstart", [*people, "stages.ppo.gold=null", "stages.evaluate.judge=reward"])
    assert parse(PipelineConfig, config.model_dump(), "again") == config
    assert "samples" not in stages and "simulated" not in str(list(stages.values()))
