"""The row of the catalog that a reinforcement learning run asks for, held against its other settings."""

from __future__ import annotations

import math

from dressage.algorithms.catalog import ALGORITHMS, Algorithm, algorithm
from dressage.algorithms.policy_gradient import PolicyGradientSettings
from dressage.algorithms.preference import OnlineDpoSettings
from dressage.algorithms.selection import SelectionSettings
from dressage.config import PpoConfig
from dressage.errors import ConfigError

_AS_THEY_ARE = PolicyGradientSettings(whiten_advantages=False)


def online_algorithm(config: PpoConfig) -> Algorithm:
    """The row with this run's settings; ConfigError where it and the other settings contradict each other."""
    name, row = config.algorithm, algorithm(config.algorithm)
    if not row.samples:
        online = ", ".join(known for known, other in ALGORITHMS.items() if other.samples)
        raise ConfigError(f"algorithm={name!r}: does not learn from sampled answers; those that do: {online}")
    row = row.with_settings(config.settings)
    settings = online_settings(row)
    if config.rollout.answers_per_prompt < row.fewest_answers:
        raise ConfigError(
            f"rollout.answers_per_prompt={config.rollout.answers_per_prompt}: algorithm={name!r} compares the answers"
            f" to a prompt with each other and needs at least {row.fewest_answers}"
        )
    if settings.redraws and config.rollout.answers_per_prompt < 2:
        raise ConfigError(
            "settings.redraws leaves out prompts whose answers score the same, and"
            " rollout.answers_per_prompt=1 has no others to compare with; set it to 2 or more"
        )
    if "value" in row.roles:
        if config.value.start == "reward" and not config.reward_models:
            raise ConfigError(
                'value.start="reward" begins the critic as a reward model, and rewards has no part of type model or'
                ' ensemble; set value.start="zero"'
            )
        if config.value.start == "base" and config.lora is None and config.value.model is None:
            raise ConfigError(
                'value.start="base" with lora=null: the base is the policy\'s to change; give the critic a value.model'
            )
        if config.value.start == "zero" and settings.max_kl is not None:
            raise ConfigError(
                f'value.start="zero" puts the critic on the trunk whose step settings.max_kl={settings.max_kl} bounds;'
                ' set value.start="reward" or "base"'
            )
    elif config.value.model is not None:
        raise ConfigError(f"value.model: algorithm={name!r} has no critic; leave value.model out")
    if isinstance(row.settings, SelectionSettings) and row.settings.threshold is None:
        answers = config.rollout.prompts_per_step * config.rollout.answers_per_prompt
        if learnt_answers(row, config) == answers:
            raise ConfigError(
                f"settings.best keeps all of rollout.answers_per_prompt={config.rollout.answers_per_prompt},"
                " and nothing else selects; sample more answers, or set settings.threshold or settings.round_share"
            )
    if isinstance(row.settings, OnlineDpoSettings) and (config.minibatch_size or 0) % ranked_answers(row, config):
        raise ConfigError(
            f"minibatch_size={config.minibatch_size}: the {ranked_answers(row, config)} ranked answers to a prompt are"
            " learnt together; set it to a multiple of that"
        )
    if settings.old_kl_coef and updates_of(row, config) < 2:
        raise ConfigError(
            "settings.old_kl_coef prices leaving the old policy, and a round's first update cannot have left it;"
            " set reuse=2 or more, or a smaller minibatch_size"
        )
    if settings.full_kl and not settings.kl_loss_coef:
        raise ConfigError("settings.full_kl is the KL in the loss, and settings.kl_loss_coef=0 leaves that out")
    return row


def online_settings(row: Algorithm) -> PolicyGradientSettings:
    """How a row weighs what it sampled; one that teaches by selection or ranking leaves it as it is."""
    assert row.samples
    return row.settings if isinstance(row.settings, PolicyGradientSettings) else _AS_THEY_ARE


def learnt_answers(row: Algorithm, config: PpoConfig) -> int:
    """How many of a round's answers are learnt from, if none is lacking."""
    prompts, answers = config.rollout.prompts_per_step, config.rollout.answers_per_prompt
    if isinstance(row.settings, SelectionSettings):
        return row.settings.most(prompts, answers)
    return prompts * ranked_answers(row, config)


def ranked_answers(row: Algorithm, config: PpoConfig) -> int:
    """How many of the answers to a prompt are compared."""
    one_pair = isinstance(row.settings, OnlineDpoSettings) and not row.settings.all_pairs
    return 2 if one_pair else config.rollout.answers_per_prompt


def updates_of(row: Algorithm, config: PpoConfig, step: int = 0) -> int:
    """Optimizer steps in round `step` (from 0), if it lacks no answer."""
    answers = learnt_answers(row, config) * (step + 1 if row.afresh else 1)
    return config.reuse * math.ceil(answers / (config.minibatch_size or answers))
