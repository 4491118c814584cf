"""Every algorithm is a row of one table. Read this file first: what differs between two methods stands here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from dressage.algorithms.advantages import (
    Advantage,
    actor_critic,
    against_batch,
    group_centered,
    group_normalized,
    leave_one_out,
    of_answers,
    reward_to_go,
)
from dressage.algorithms.aggregate import Weigh, constant_length, sequence_mean, token_mean
from dressage.algorithms.kl import k2, k3
from dressage.algorithms.policy_gradient import (
    Estimator,
    PolicyGradientSettings,
    Surrogate,
    clipped,
    likelihood,
    policy_loss,
    sequence_clipped,
    unclipped,
    weighted_likelihood,
)
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
    fewest_answers: int = 1
    """To a prompt: who is compared with others needs another."""
    greedy_baseline: bool = False
    """The score of the likeliest answer to the prompt is taken off every answer's advantage."""

    def with_settings(self, changes: Mapping[str, Any]) -> Algorithm:
        """The same with some settings changed; an unknown one is a ConfigError."""
        known = [field.name for field in fields(self.settings)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1) or known
                raise ConfigError(f"settings.{name}: unknown setting; known: {', '.join(near) or 'none'}")
        return replace(self, settings=replace(self.settings, **changes))


def _learns(surrogate: Surrogate, kl: Estimator = k2) -> Mapping[type, Loss]:
    """From the policy's own answers, and from demonstrations beside them if settings.ptx_coef says so."""
    return {Experience: partial(policy_loss, surrogate=surrogate, kl=kl), SupervisedBatch: ptx_loss}


REWARD = Algorithm(losses={PreferenceBatch: partial(ranking_loss, pair_loss=log_sig)}, settings=RankingSettings())

DPO = Algorithm(
    losses={PreferenceBatch: dpo_loss},
    implicit_reward=log_ratio_reward,
    roles=frozenset({"reference"}),
    settings=DpoSettings(),
)
WITHOUT_REFERENCE = replace(DPO, roles=frozenset())

# With a critic.
PPO = Algorithm(
    losses=_learns(clipped),
    advantage=actor_critic,
    roles=frozenset({"reference", "value", "reward"}),
    settings=PolicyGradientSettings(),
)
# Mnih et al. 2016: the critic's error over all that came, one step of the optimizer, an entropy bonus.
A2C = replace(
    PPO,
    losses=_learns(likelihood),
    settings=PolicyGradientSettings(
        lam=1.0, entropy_coef=0.01, value_coef=0.5, value_clip=None, whiten_advantages=False
    ),
)

# Without one.
REINFORCE = Algorithm(
    losses=_learns(likelihood),
    advantage=against_batch,
    roles=frozenset({"reference", "reward"}),
    settings=PolicyGradientSettings(whiten_advantages=False),
)

# Against the other answers to the prompt.
GROUP = replace(
    REINFORCE,
    losses=_learns(clipped),
    advantage=of_answers(group_normalized),
    weigh=sequence_mean,
    fewest_answers=2,
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
    # Schulman et al. 2017, sec. 4: no clip, but a price on leaving the old policy, which adapts.
    "ppo_penalty": replace(PPO, losses=_learns(unclipped)).with_settings({"old_kl_coef": 1.0}),
    # Schulman et al. 2015: the step itself is bounded; the critic has weights and an optimizer of its own.
    "trpo": replace(PPO, losses=_learns(unclipped)).with_settings({"max_kl": 0.01}),
    "a2c": A2C,
    # The critic's error over one token (Sutton and Barto 2018, sec. 13.5).
    "actor_critic": A2C.with_settings({"lam": 0.0, "entropy_coef": 0.0}),
    "reinforce": REINFORCE,
    # Li et al. 2024: the likeliest answer's score is the baseline.
    "remax": replace(REINFORCE, advantage=reward_to_go, greedy_baseline=True),
    # Hu et al. 2025: PPO's clip, and whitening over the round in the critic's place; the KL is in the reward.
    "reinforce_pp": replace(PPO, advantage=reward_to_go, roles=REINFORCE.roles),
    # Ahmadian et al. 2024, eq. 8.
    "rloo": replace(REINFORCE, advantage=of_answers(leave_one_out), fewest_answers=2),
    # Shao et al. 2024, eq. 3: the KL is in the loss, by k3.
    "grpo": replace(GROUP, losses=_learns(clipped, kl=k3)).with_settings({"kl_loss_coef": 0.04}),
    # Liu et al. 2025: divided neither by the deviation nor by an answer's length.
    "dr_grpo": replace(GROUP, advantage=of_answers(group_centered), weigh=constant_length),
    # Yu et al. 2025: clip higher, tokens alike, groups without spread drawn again. Its soft penalty: `truncated`.
    "dapo": replace(GROUP, weigh=token_mean).with_settings({"clip_high": 0.28, "redraws": 3}),
    # Zheng et al. 2025, sec. 5.1: the ratio of a whole answer, hence the narrow clip.
    "gspo": replace(GROUP, losses=_learns(sequence_clipped)).with_settings({"clip_low": 3e-4, "clip_high": 4e-4}),
    # MiniMax 2025: no lower bound on the weight, and a wide upper one.
    "cispo": replace(GROUP, losses=_learns(weighted_likelihood), weigh=token_mean).with_settings(
        {"clip_low": 1.0, "clip_high": 4.0}
    ),
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
