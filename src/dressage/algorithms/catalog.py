"""Every algorithm is a row of one table. Read this file first: what differs between two methods stands here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from dressage.algorithms.advantages import Advantage, actor_critic
from dressage.algorithms.aggregate import Weigh, token_mean
from dressage.algorithms.policy_gradient import PolicyGradientSettings, ppo_loss
from dressage.algorithms.preference import (
    DpoSettings,
    ImplicitReward,
    IpoSettings,
    KtoSettings,
    OrpoSettings,
    SimpoSettings,
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_odds_reward,
    log_ratio_reward,
    mean_log_ratio_reward,
    mean_logprob_reward,
    orpo_loss,
    simpo_loss,
)
from dressage.algorithms.reward_modeling import RankingSettings, log_exp, log_sig, ranking_loss
from dressage.algorithms.supervised import SupervisedSettings, ptx_loss, supervised_loss
from dressage.batches import Experience, PreferenceBatch, RatingBatch, SupervisedBatch
from dressage.errors import ConfigError

Loss = Callable[..., dict[str, Tensor]]
"""Named terms, signed and weighted, for every token (rankings: pair; ratings: answer); their sum is the loss.

Called with

SupervisedBatch: (TokenScores, batch, settings)
PreferenceBatch, RatingBatch: (rewards [N], batch, settings)
Experience: (TokenScores, values [B, T] or None, batch, settings)
"""
ModelRole = Literal["reference", "value", "reward"]
PreferenceSettings = DpoSettings | IpoSettings | KtoSettings | OrpoSettings | SimpoSettings
Settings = SupervisedSettings | RankingSettings | PreferenceSettings | PolicyGradientSettings


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What to learn from which batches, and what must be at hand for it."""

    losses: Mapping[type, Loss]
    """By the type of the batch; several types are learnt in one optimizer step."""
    settings: Settings
    """The method's own defaults."""
    roles: frozenset[ModelRole] = frozenset()
    """Models needed beside the one being trained."""
    implicit_reward: ImplicitReward | None = None
    """How a policy's log-probability of an answer is read as its reward; none: rewards come from a reward model."""
    advantage: Advantage | None = None
    """How rewards become advantages; none: nothing is sampled."""
    weigh: Weigh = token_mean
    """How tokens share the loss."""

    def with_settings(self, changes: Mapping[str, Any]) -> Algorithm:
        """The same with some settings changed; an unknown one is a ConfigError."""
        known = [field.name for field in fields(self.settings)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1) or known
                raise ConfigError(f"settings.{name}: unknown setting; known: {', '.join(near) or 'none'}")
        return replace(self, settings=replace(self.settings, **changes))


REWARD = Algorithm(losses={PreferenceBatch: partial(ranking_loss, pair_loss=log_sig)}, settings=RankingSettings())

DPO = Algorithm(
    losses={PreferenceBatch: dpo_loss},
    implicit_reward=log_ratio_reward,
    roles=frozenset({"reference"}),
    settings=DpoSettings(),
)
WITHOUT_REFERENCE = replace(DPO, roles=frozenset())

PPO = Algorithm(
    losses={Experience: ppo_loss, SupervisedBatch: ptx_loss},
    advantage=actor_critic,
    roles=frozenset({"reference", "value", "reward"}),
    settings=PolicyGradientSettings(),
)

ALGORITHMS: Mapping[str, Algorithm] = {
    "sft": Algorithm(losses={SupervisedBatch: supervised_loss}, settings=SupervisedSettings()),
    "reward_log_sig": REWARD,
    "reward_log_exp": replace(REWARD, losses={PreferenceBatch: partial(ranking_loss, pair_loss=log_exp)}),
    "dpo": DPO,
    "cdpo": replace(DPO, settings=DpoSettings(label_smoothing=0.1)),
    "ipo": replace(
        DPO, losses={PreferenceBatch: ipo_loss}, implicit_reward=mean_log_ratio_reward, settings=IpoSettings()
    ),
    "kto": replace(DPO, losses={RatingBatch: kto_loss}, settings=KtoSettings()),
    "orpo": replace(
        WITHOUT_REFERENCE, losses={PreferenceBatch: orpo_loss}, implicit_reward=log_odds_reward, settings=OrpoSettings()
    ),
    "simpo": replace(
        WITHOUT_REFERENCE,
        losses={PreferenceBatch: simpo_loss},
        implicit_reward=mean_logprob_reward,
        settings=SimpoSettings(),
    ),
    "ppo": PPO,
}


def algorithm(name: str) -> Algorithm:
    """The row of this name; an unknown name is a ConfigError."""
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm={name!r}: there is no such row; known: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def preference_algorithm(name: str) -> Algorithm:
    """The row of this name, one that teaches a policy people's judgements; any other name is a ConfigError."""
    row = algorithm(name)
    if row.implicit_reward is None:
        known = ", ".join(known for known, other in ALGORITHMS.items() if other.implicit_reward is not None)
        raise ConfigError(f"algorithm={name!r}: does not learn from preferences; those that do: {known}")
    return row
