"""What a run's settings say of rewards, to objects that grade: see assemble.py for all else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dressage.assemble import build_engine, build_template
from dressage.config import (
    PpoConfig,
)
from dressage.data.template import ChatTemplate
from dressage.errors import ConfigError
from dressage.models.backbone import Backbone
from dressage.models.files import (
    load_backbone,
    load_reward_model,
    saved_model,
)
from dressage.models.roles import Role
from dressage.reward_parts import (
    ClassifierPart,
    EnsemblePart,
    ExactPart,
    FunctionPart,
    JudgeConfig,
    JudgePart,
    LengthPart,
    ModelPart,
    NumberPart,
    PatternPart,
    RemotePart,
    RewardPart,
)
from dressage.rewards import verifiers
from dressage.rewards.check import MADE_UP, check_targets, try_out
from dressage.rewards.classifier import load_classifier
from dressage.rewards.combined import CombinedReward
from dressage.rewards.functions import FunctionReward
from dressage.rewards.judge import Ask, JudgeReward, model_here, model_there
from dressage.rewards.learned import LearnedReward, pessimistic
from dressage.rewards.pair_judge import Pair, PairJudge
from dressage.rewards.parts import Grade, Part
from dressage.rewards.remote import RemoteReward
from dressage.schema import Prompt
from dressage.settings import ModelConfig

PATTERN = "dressage.rewards.verifiers:pattern"
JUDGED_AT_ONCE = 16


def build_rewards(
    config: PpoConfig, backbone: Backbone, own: ChatTemplate
) -> tuple[CombinedReward, Mapping[str, Role]]:
    """The weighted sum of the settings' parts, and the learned reward models in it by their folders."""
    # On a shared base each needs a name of its own.
    names = {folder: f"reward-{number}" for number, folder in enumerate(config.reward_models)}
    # Where all weights of the policy learn, reward models must not stand on them: they have their own.
    shared = backbone if config.lora is not None else None
    learned = {folder: build_reward_model(folder, config.model, shared, own, name) for folder, name in names.items()}
    parts = {
        name: Part(_grade(name, part, learned, config.seed), part.weight, getattr(part, "on_failure", 0.0))
        for name, part in config.parts.items()
    }
    return CombinedReward(parts), {folder: one.role for folder, one in learned.items()}


def check_rewards(config: PpoConfig, prompts: Sequence[Prompt]) -> None:
    """Tries what runs outside this process on two rows, and looks for targets, before any model is loaded.

    ConfigError, DataError: the run would earn nothing from this part.
    """
    for name, part in config.parts.items():
        if isinstance(part, NumberPart | ExactPart):
            check_targets(f"rewards.{name} (type {part.type})", part.type, prompts, config.prompts.sources)
        elif isinstance(part, FunctionPart | RemotePart | PatternPart) or (isinstance(part, JudgePart) and part.url):
            try_out(f"rewards.{name}", _grade(name, part, {}, config.seed), prompts)


def _grade(name: str, part: RewardPart, learned: Mapping[str, LearnedReward], seed: int) -> Grade:
    """What grades as a part's settings say; `learned` are reward models by their folders."""
    match part:
        case ModelPart():
            return learned[part.folder].grade
        case EnsemblePart():
            return partial(pessimistic, [learned[folder] for folder in part.folders], part.uncertainty_coef)
        case FunctionPart():
            return FunctionReward(part.function, part.timeout_seconds)
        case PatternPart():
            return FunctionReward(PATTERN, part.timeout_seconds, {"pattern": part.pattern})
        case NumberPart():
            return partial(verifiers.against_targets, verifiers.number)
        case ExactPart():
            return partial(verifiers.against_targets, verifiers.exact)
        case LengthPart():
            return partial(verifiers.within_length, part.low, part.high, part.unit)
        case ClassifierPart():
            probability = part.score == "probability"
            return load_classifier(
                part.model, part.label, part.reads, probability=probability, max_tokens=part.max_tokens
            )
        case RemotePart():
            return RemoteReward(part.url, part.timeout_seconds, part.batch_size)
        case JudgePart():
            return JudgeReward(_ask(f"rewards.{name}", part), part.criteria, part.low, part.high, seed)


def build_pair_judge(judge: JudgeConfig, seed: int) -> PairJudge:
    """Who says which of two answers is better; a server is first asked about two made-up answers.

    ConfigError, EngineError: nobody can be asked.
    """
    built = PairJudge(_ask("pair_judge", judge), judge.criteria, seed)
    if judge.url is not None:
        built([Pair("What is 2 + 3?", *MADE_UP)])
    return built


def _ask(where: str, judge: JudgeConfig) -> Ask:
    """Asks the judge of the settings of that name."""
    if judge.url is None:
        template, role = build_template(judge.model), Role(load_backbone(judge.model))
        return model_here(build_engine("native", role, template, JUDGED_AT_ONCE), template, judge.max_new_tokens)
    key = None if judge.key_variable is None else os.environ.get(judge.key_variable)
    if judge.key_variable is not None and not key:
        raise ConfigError(
            f"{where}: key_variable={judge.key_variable}: no such environment variable; set it to the key"
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{where}: key_variable={judge.key_variable}: that environment variable holds a line break or another"
            " letter that no key has; set it anew"
        )
    return model_there(judge.url, judge.model.name, judge.max_new_tokens, judge.timeout_seconds, key)


def build_reward_model(
    folder: str, model: ModelConfig, backbone: Backbone | None, own: ChatTemplate, name: str = "reward"
) -> LearnedReward:
    """Scores answers written with the template `own`: on `backbone`, which is `model`, where it can, as an adapter."""
    role = load_reward_model(Path(folder), backbone, model, name)
    role.backbone.freeze_base()
    for parameter in role.parameters().values():
        parameter.requires_grad_(False)
    template = build_template(saved_model(Path(folder)))
    # On one base too: a reward model knows answers as they were written when it was trained.
    writing = ((t.tokenizer.get_vocab(), t.source, t.system, t.thinking) for t in (template, own))
    return LearnedReward(role, None if next(writing) == next(writing) else template)
