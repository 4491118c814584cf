"""From what a user names to what is examined: a recipe, a run's folder, a model or a data file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dressage import assemble
from dressage.assemble import located
from dressage.batches import RatingBatch
from dressage.config import STAGE_KINDS, DataConfig, DpoConfig, PpoConfig, RewardConfig, SftConfig
from dressage.data.sources import read_demonstrations, read_prompts, read_rankings, read_ratings
from dressage.data.template import ChatTemplate
from dressage.doctor.subject import Subject, Text, main_stage, read_text
from dressage.errors import ConfigError, DataError
from dressage.models.files import role_meta, saved_model
from dressage.models.pretrained import ADAPTER_FILE, ROLE_FILE
from dressage.monitor.run_folder import read_stages
from dressage.recipe import kind_of, load_pipeline, load_stage, override, parse, read_yaml
from dressage.settings import ModelConfig, Settings

STARTER = "quickstart"
Stages = Mapping[str, Settings]


def subject_of(target: str | None, overrides: Sequence[str], scratch: Path) -> Subject:
    """What `target` names, read and encoded; no weights yet. Nothing named: the starter recipes with their material.

    ConfigError, DataError, ModelError: where a run would stop too.
    """
    stages, folder = stages_of(target, overrides, scratch)
    main = main_stage(stages)
    model = there(main.model, stages, folder)
    template = assemble.build_template(model)
    subject = Subject(stages, folder, template, (), scratch, model)
    subject.texts = texts_of(stages, template, folder)
    return subject


def stages_of(target: str | None, overrides: Sequence[str], scratch: Path) -> tuple[Stages, Path]:
    """The stages that a recipe or a run has; for a model or a file, those of the starter recipe with it."""

    def starter(*changes: str) -> tuple[Stages, Path]:
        # Nothing of an earlier run is taken for it; and its reward model's depth is for its own model.
        fresh = [f"folder={json.dumps(str(scratch / 'run'))}"]
        own = all(not change.startswith("model") for change in (*changes, *overrides))
        return _pipeline(STARTER, [*fresh, *([] if own else ["stages.reward.depth=null"]), *changes, *overrides])

    if target is None:
        return starter()
    path = Path(target)
    if path.is_dir():
        if (path / "config.json").is_file() or (path / ADAPTER_FILE).is_file():
            return starter(*_with_model(path))
        return _of_run(path, overrides)
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        return starter(*_with_data(target))
    raw = read_yaml(target)
    if "stages" in raw:
        return _pipeline(target, overrides)
    return {path.stem: load_stage(kind_of(raw.get("kind"), target), target, overrides)}, Path("runs")


def there(model: ModelConfig, stages: Stages, folder: Path) -> ModelConfig:
    """The model, or, while it has not been made, the one from which the stage that makes it begins."""
    for name, stage in stages.items():
        if Path(model.name).is_relative_to(folder / name) and not Path(model.name).exists():
            below: ModelConfig = stage.model  # type: ignore[attr-defined]
            return there(model.model_copy(update={"name": below.name}), stages, folder)
    return model


def texts_of(stages: Stages, template: ChatTemplate, folder: Path) -> list[Text]:
    """What the stages learn from, as far as it is there: a later stage's data may be an earlier one's product."""
    wanted: list[tuple[assemble.Records, DataConfig]] = []
    for stage in stages.values():
        match stage:
            case SftConfig():
                wanted.append(("demonstrations", stage.data))
            case PpoConfig():
                wanted.append(("prompts", stage.prompts))
                wanted += [("demonstrations", stage.ptx.data)] if stage.ptx else []
            case RewardConfig() | DpoConfig():
                wanted.append(("rankings" if not _rates(stage) else "ratings", stage.data))
    texts = []
    for kind, data in dict.fromkeys(wanted):
        absent = [Path(source) for source in data.sources if not Path(located(source)).exists()]
        if not any(path.is_relative_to(folder / name) for path in absent for name in stages):
            texts.append(read_text(kind, data, template))
    return texts


def _rates(stage: RewardConfig | DpoConfig) -> bool:
    return isinstance(stage, DpoConfig) and RatingBatch in assemble.build_preference_algorithm(stage).losses


def _pipeline(recipe: str, overrides: Sequence[str]) -> tuple[Stages, Path]:
    plan, stages = load_pipeline(recipe, overrides)
    return stages, Path(plan.folder)


def _with_model(folder: Path) -> list[str]:
    """Overrides by which a recipe is about this model, with the template it was trained with."""
    if not (folder / ROLE_FILE).is_file():
        return [f"model={json.dumps({'name': str(folder)})}"]
    kind, saved = role_meta(folder)["kind"], saved_model(folder)
    if kind == "reward":
        model = f"model={json.dumps(saved.model_dump())}"
        return [model, f"stages.ppo.reward_model={json.dumps(str(folder))}"]
    return [f"model={json.dumps(saved.model_dump() | {'name': str(folder)})}"]


def _with_data(path: str) -> list[str]:
    """Overrides by which a recipe learns from this file, as what it is."""
    sources = json.dumps([path])
    ways: Mapping[Callable[..., Any], list[str]] = {
        read_rankings: [f"stages.reward.data.sources={sources}"],
        read_ratings: ["stages.kto={kind: dpo, algorithm: kto, data: {sources: " + sources + "}}"],
        read_demonstrations: [f"stages.sft.data.sources={sources}", f"stages.ppo.ptx.data.sources={sources}"],
        read_prompts: [f"stages.ppo.prompts.sources={sources}"],
    }
    refused: list[DataError] = []
    for read, overrides in ways.items():
        try:
            read(path, on_bad_row="drop", limit=1)
            return overrides
        except DataError as error:
            refused.append(error)
    raise refused[-1]


def _of_run(folder: Path, overrides: Sequence[str]) -> tuple[Stages, Path]:
    """The stages that a run's folder tells of; for a whole run, overrides begin with "stages.NAME."."""
    stages = {stage.name: stage for stage in read_stages(folder) if stage.manifest}
    if not stages:
        raise ConfigError(f"{folder}: holds neither a run nor a model")
    raw: dict[str, Any] = {name: dict(stage.settings) for name, stage in stages.items()}
    whole = len(raw) > 1 or (folder / "pipeline.json").is_file()
    changed = override({"stages": raw} if whole else next(iter(raw.values())), overrides)
    raw = changed["stages"] if whole else {name: changed for name in raw}
    kinds = {name: kind_of(stages[name].kind, f"{folder / name}") if name in stages else "" for name in raw}
    parsed = {name: parse(STAGE_KINDS[kinds[name]], value, f"{folder / name}") for name, value in raw.items()}
    return parsed, folder if whole else folder.parent
