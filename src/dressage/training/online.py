"""The row of the catalog that a reinforcement learning run asks for, held against its other settings."""

from __future__ import annotations

import math

from dressage.algorithms.catalog import ALGORITHMS, Algorithm, algorithm
from dressage.algorithms.policy_gradient import PolicyGradientSettings
from dressage.config import PpoConfig
from dressage.errors import ConfigError


def online_algorithm(config: PpoConfig) -> Algorithm:
    """The row with this run's settings; ConfigError where it and the other settings contradict each other."""
    name, row = config.algorithm, algorithm(config.algorithm)
    if row.advantage is None:
        online = ", ".join(known for known, other in ALGORITHMS.items() if other.advantage is not None)
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
        if config.value.start == "reward" and config.lora is None:
            raise ConfigError('value.start="reward" needs lora: with full weights set value.start="zero"')
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
    if settings.old_kl_coef and updates_per_round(config) < 2:
        raise ConfigError(
            "settings.old_kl_coef prices leaving the old policy, and a round's first update cannot have left it;"
            " set reuse=2 or more, or a smaller minibatch_size"
        )
    if settings.full_kl and not settings.kl_loss_coef:
        raise ConfigError("settings.full_kl is the KL in the loss, and settings.kl_loss_coef=0 leaves that out")
    return row


def online_settings(row: Algorithm) -> PolicyGradientSettings:
    """The settings of a row that samples."""
    assert isinstance(row.settings, PolicyGradientSettings)
    return row.settings


def updates_per_round(config: PpoConfig) -> int:
    """Optimizer steps in a round that lacks no answer."""
    answers = config.rollout.prompts_per_step * config.rollout.answers_per_prompt
    return config.reuse * math.ceil(answers / (config.minibatch_size or answers))
