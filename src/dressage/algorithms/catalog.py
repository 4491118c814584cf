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
    OnlineDpoSettings,
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
    robust_dpo_loss,
    simpo_loss,
)
from dressage.algorithms.reward_modeling import (
    PairLoss,
    RankingSettings,
    RegressionSettings,
    imitation_loss,
    log_exp,
    log_sig,
    ranking_loss,
    regression_loss,
)
from dressage.algorithms.selection import SelectionSettings, imitated, ranked
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
Teach = Callable[..., SupervisedBatch | PreferenceBatch]
"""Demonstrations or rankings from (experience, what each answer earned [B], settings, seed)."""
PreferenceSettings = DpoSettings | OnlineDpoSettings | IpoSettings | KtoSettings | OrpoSettings | SimpoSettings
RewardSettings = RankingSettings | RegressionSettings
Settings = SupervisedSettings | RewardSettings | PreferenceSettings | SelectionSettings | PolicyGradientSettings


@dataclass(frozen=True)
class About:
    """What a row is to somebody who chooses one: `dressage algorithms` and docs/algorithms.md show it."""

    title: str
    loss: str
    """What is minimised. r: probability ratio new to old of a token; A: its advantage; p, q: policy and reference."""
    paper: str
    use: str
    """When to take it, and what to watch."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What to learn from which batches, and what must be at hand for it."""

    about: About
    losses: Mapping[type, Loss]
    """By the type of the batch; several types are learnt in one optimizer step."""
    settings: Settings
    """The method's own defaults."""
    roles: frozenset[ModelRole] = frozenset()
    """Models needed beside the one being trained."""
    implicit_reward: ImplicitReward | None = None
    """How a policy's log-probability of an answer is read as its reward; none: rewards come from a reward model."""
    advantage: Advantage | None = None
    """How rewards become advantages; none: nothing is sampled, or nothing weighed."""
    teach: Teach | None = None
    """How sampled answers become demonstrations or rankings; none: nothing is sampled, or they stay Experience."""
    afresh: bool = False
    """Every round learns what was kept in all rounds so far, from the first weights on."""
    weigh: Weigh = token_mean
    """How tokens share the loss."""
    fewest_answers: int = 1
    """To a prompt: who is compared with others needs another."""
    greedy_baseline: bool = False
    """The score of the likeliest answer to the prompt is taken off every answer's advantage."""

    @property
    def samples(self) -> bool:
        """Whether it learns from the policy's own answers."""
        return self.advantage is not None or self.teach is not None

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


def _ranks(pair_loss: PairLoss) -> Mapping[type, Loss]:
    """From rankings, and by imitating their best answers if settings.lm_coef says so."""
    return {PreferenceBatch: partial(ranking_loss, pair_loss=pair_loss), SupervisedBatch: imitation_loss}


REWARD = Algorithm(
    about=About(
        "reward model, log-sigmoid",
        "-log sigmoid(s(better) - s(worse) - margin), mean over the C(K, 2) pairs of a prompt, then over prompts",
        "Ouyang et al. 2022, eq. 1",
        "Rankings or comparisons to a model that scores answers. Margins can grow with grades, and ties can teach.",
    ),
    losses=_ranks(log_sig),
    settings=RankingSettings(),
)

DPO = Algorithm(
    about=About(
        "direct preference optimisation",
        "-log sigmoid(s(better) - s(worse)), s = beta log p(answer) / q(answer)",
        "Rafailov et al. 2023, eq. 7",
        "Preferences to a policy without a reward model or sampling. The first to try on a fixed set of comparisons.",
    ),
    losses={PreferenceBatch: dpo_loss},
    implicit_reward=log_ratio_reward,
    roles=frozenset({"reference"}),
    settings=DpoSettings(),
)
WITHOUT_REFERENCE = replace(DPO, roles=frozenset())

# With a critic.
PPO = Algorithm(
    about=About(
        "proximal policy optimisation, clipped",
        "-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + value_coef x the critic's clipped error; A by GAE",
        "Schulman et al. 2017, eq. 7",
        "The standard of RLHF. With settings.ptx_coef and ptx.data it is PPO-ptx (Ouyang et al. 2022, eq. 2).",
    ),
    losses=_learns(clipped),
    advantage=actor_critic,
    roles=frozenset({"reference", "value", "reward"}),
    settings=PolicyGradientSettings(),
)
A2C = replace(
    PPO,
    about=About(
        "advantage actor-critic",
        "-A log p - entropy_coef x entropy + value_coef x the critic's error; A: all reward that came, less the value",
        "Mnih et al. 2016",
        "One step of the optimizer for each round (reuse=1): the plainest method with a critic.",
    ),
    losses=_learns(likelihood),
    settings=PolicyGradientSettings(
        lam=1.0, entropy_coef=0.01, value_coef=0.5, value_clip=None, whiten_advantages=False
    ),
)

# Without one.
REINFORCE = Algorithm(
    about=About(
        "REINFORCE",
        "-A log p; A: reward-to-go, less its mean over the round",
        "Williams 1992",
        "One answer a prompt and no critic: little memory, much noise. Rounds of many prompts steady it.",
    ),
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

# What is good among a round's answers is imitated.
REJECTION_SAMPLING = Algorithm(
    about=About(
        "rejection sampling (RAFT)",
        "-log p of the best of each prompt's answers; also a threshold (ReST) or a share of the round",
        "Dong et al. 2023, alg. 1; Gulcehre et al. 2023",
        "The simplest that improves: no ratio, no critic, nothing to tune but what is kept. Raise answers_per_prompt.",
    ),
    losses={SupervisedBatch: supervised_loss},
    teach=imitated,
    roles=frozenset({"reference", "reward"}),
    settings=SelectionSettings(),
)

ALGORITHMS: Mapping[str, Algorithm] = {
    "sft": Algorithm(
        about=About(
            "supervised fine-tuning",
            "-log p of every token of the answers and their end marks, mean over tokens",
            "Ouyang et al. 2022, sec. 3.5",
            "Demonstrations to a policy that imitates them: the start of everything else.",
        ),
        losses={SupervisedBatch: supervised_loss},
        settings=SupervisedSettings(),
    ),
    "reward_log_sig": REWARD,
    "reward_log_exp": replace(
        REWARD,
        about=About(
            "reward model, log-exp",
            "log(1 + exp(s(worse) - s(better) + margin)): the same number as reward_log_sig",
            "ColossalChat's name for it",
            "For settings that ask for it by this name; it changes nothing.",
        ),
        losses=_ranks(log_exp),
    ),
    "reward_regression": replace(
        REWARD,
        about=About(
            "reward model, regression",
            "(s(answer) - grade)^2, grades standardised, mean over a prompt's answers, then over prompts",
            "grades: Bradley and Terry 1952, by Hunter 2004; Elo 1978",
            "Many judgements of the same answers become one grade each (data.merge), or rankings that hold grades.",
        ),
        losses={PreferenceBatch: regression_loss},
        settings=RegressionSettings(),
    ),
    "dpo": DPO,
    "cdpo": replace(
        DPO,
        about=About(
            "conservative DPO",
            "(1 - label_smoothing) x DPO's loss + label_smoothing x that of the opposite choice",
            "Mitchell 2023; Rafailov et al. 2023",
            "DPO where some of the preferences are known to be noted the wrong way round.",
        ),
        settings=DpoSettings(label_smoothing=0.1),
    ),
    "rdpo": replace(
        DPO,
        about=About(
            "robust DPO",
            "((1 - e) x DPO's loss - e x that of the opposite choice) / (1 - 2 e), e = label_smoothing",
            "Chowdhury et al. 2024",
            "Where the share of wrong labels is known: unlike cdpo it aims at what clean labels would have taught.",
        ),
        losses={PreferenceBatch: robust_dpo_loss},
        settings=DpoSettings(label_smoothing=0.1),
    ),
    "ipo": replace(
        DPO,
        about=About(
            "identity preference optimisation",
            "(s(better) - s(worse) - 1 / (2 beta))^2, s = mean over the answer's tokens of log p / q",
            "Azar et al. 2023, eq. 17, averaged per token",
            "Where comparisons are few or unanimous and DPO runs away: the difference has a target, not a direction.",
        ),
        losses={PreferenceBatch: ipo_loss},
        implicit_reward=mean_log_ratio_reward,
        settings=IpoSettings(),
    ),
    "kto": replace(
        DPO,
        about=About(
            "Kahneman-Tversky optimisation",
            "weight x (1 - sigmoid(+-(s - beta KL))), s = beta log p / q; KL from unrelated answers, at least 0",
            "Ethayarajh et al. 2024, eq. 8",
            "Thumbs up and down on single answers, no pairs; weigh the rarer side more.",
        ),
        losses={RatingBatch: kto_loss},
        settings=KtoSettings(),
    ),
    "orpo": replace(
        WITHOUT_REFERENCE,
        about=About(
            "odds-ratio preference optimisation",
            "-log p(better) per token + odds_coef x -log sigmoid(log odds(better) - log odds(worse))",
            "Hong et al. 2024, eq. 6",
            "From a base model in one stage: it imitates the better answers and needs no SFT before.",
        ),
        losses={PreferenceBatch: orpo_loss},
        implicit_reward=log_odds_reward,
        settings=OrpoSettings(),
    ),
    "simpo": replace(
        WITHOUT_REFERENCE,
        about=About(
            "simple preference optimisation",
            "-log sigmoid(s(better) - s(worse) - margin), s = beta x mean log p of the answer's tokens",
            "Meng et al. 2024, eq. 6",
            "No reference to hold it: less memory, no bias to length, and nothing but the learning rate against drift.",
        ),
        losses={PreferenceBatch: simpo_loss},
        implicit_reward=mean_logprob_reward,
        settings=SimpoSettings(),
    ),
    "ppo": PPO,
    "ppo_penalty": replace(
        PPO,
        about=About(
            "PPO with a KL penalty",
            "-r A + old_kl_coef x KL(old || new) + the critic's error; the coefficient adapts (section old_kl)",
            "Schulman et al. 2017, sec. 4",
            "In place of the clip; needs reuse of 2 or more, or minibatches, to have left the old policy at all.",
        ),
        losses=_learns(unclipped),
    ).with_settings({"old_kl_coef": 1.0}),
    # The critic has weights and an optimizer of its own: the step is the policy's.
    "trpo": replace(
        PPO,
        about=About(
            "trust-region policy optimisation",
            "-r A, by conjugate gradients on the Fisher matrix and a line search within max_kl nats a token",
            "Schulman et al. 2015, sec. 6 and app. C",
            "A real bound on every step, on adapters or all weights; the matrix is of a quarter of the answers.",
        ),
        losses=_learns(unclipped),
    ).with_settings({"max_kl": 0.01, "curvature_share": 0.25}),
    "a2c": A2C,
    "actor_critic": replace(
        A2C,
        about=About(
            "one-step actor-critic",
            "-A log p + value_coef x the critic's error; A: the TD error over one token",
            "Sutton and Barto 2018, sec. 13.5",
            "To see what the critic alone does; with a reward at the end it learns backwards, token by token.",
        ),
    ).with_settings({"lam": 0.0, "entropy_coef": 0.0}),
    "reinforce": REINFORCE,
    "remax": replace(
        REINFORCE,
        about=About(
            "ReMax",
            "-A log p; A: reward-to-go, less the score of the likeliest answer to the prompt",
            "Li et al. 2024, eq. 5",
            "One answer a prompt with a baseline for that prompt; costs one greedy answer more each.",
        ),
        advantage=reward_to_go,
        greedy_baseline=True,
    ),
    "reinforce_pp": replace(
        PPO,
        about=About(
            "REINFORCE++",
            "PPO's clipped loss; A: reward-to-go with the KL in it, whitened over the round",
            "Hu et al. 2025",
            "PPO without a critic: whitening is the baseline, so rounds should be large.",
        ),
        advantage=reward_to_go,
        roles=REINFORCE.roles,
    ),
    "rloo": replace(
        REINFORCE,
        about=About(
            "REINFORCE, leave one out",
            "-A log p; A: score less the mean of the other answers to the prompt",
            "Ahmadian et al. 2024, eq. 8",
            "No critic and no bias: a sound first choice where two or more answers a prompt can be sampled.",
        ),
        advantage=of_answers(leave_one_out),
        fewest_answers=2,
    ),
    "grpo": replace(
        GROUP,
        about=About(
            "group-relative policy optimisation",
            "PPO's loss + kl_loss_coef x k3(p, q), mean by answer; A: score less the group's mean, over its deviation",
            "Shao et al. 2024, eq. 3",
            "Verifiable rewards. Easy and hard prompts pull more than others, short answers more than long ones.",
        ),
        losses=_learns(clipped, kl=k3),
    ).with_settings({"kl_loss_coef": 0.04}),
    "dr_grpo": replace(
        GROUP,
        about=About(
            "GRPO done right",
            "PPO's clipped loss, summed over tokens by a constant length; A: score less the group's mean",
            "Liu et al. 2025",
            "GRPO without its two biases: nothing is divided by the deviation or by an answer's own length.",
        ),
        advantage=of_answers(group_centered),
        weigh=constant_length,
    ),
    "dapo": replace(
        GROUP,
        about=About(
            "decoupled clip and dynamic sampling",
            "PPO's loss with clip_high > clip_low, mean over tokens; groups that score alike are drawn again (redraws)",
            "Yu et al. 2025, eq. 8 to 13",
            "Long answers with verifiable rewards. Its soft price on length is truncated=soft.",
        ),
        weigh=token_mean,
    ).with_settings({"clip_high": 0.28, "redraws": 3}),
    # A whole answer's ratio moves far less than a token's: hence the narrow clip.
    "gspo": replace(
        GROUP,
        about=About(
            "group sequence policy optimisation",
            "-min(r A, clip(r) A) with r = (p / p_old of the whole answer)^(1 / its length); A as in grpo",
            "Zheng et al. 2025, eq. 5 and sec. 5.1",
            "Where ratios of single tokens are noisy: mixtures of experts, long answers, another engine's samples.",
        ),
        losses=_learns(sequence_clipped),
    ).with_settings({"clip_low": 3e-4, "clip_high": 4e-4}),
    "cispo": replace(
        GROUP,
        about=About(
            "clipped importance weights",
            "-min(r, 1 + clip_high) A log p with r held constant, mean over tokens; A as in grpo",
            "MiniMax 2025, eq. 4",
            "Several updates a round without silencing rare, decisive tokens: each keeps a gradient.",
        ),
        losses=_learns(weighted_likelihood),
        weigh=token_mean,
    ).with_settings({"clip_low": 1.0, "clip_high": 4.0}),
    "rejection_sampling": REJECTION_SAMPLING,
    "expert_iteration": replace(
        REJECTION_SAMPLING,
        about=About(
            "expert iteration",
            "-log p of the best answers of all rounds so far, learnt in each round from the first weights on",
            "Anthony et al. 2017, aggregated; from the first weights Singh et al. 2023",
            "Where a policy that learns from itself drifts: slower and dearer than rejection_sampling, and steadier.",
        ),
        afresh=True,
    ),
    "online_dpo": replace(
        DPO,
        about=About(
            "online DPO",
            "DPO's loss on the best against the worst of the policy's own answers to a prompt (all_pairs: on all)",
            "Guo et al. 2024",
            "DPO where a reward model can say which answer is better; label_noise=1 labels as Bradley and Terry would.",
        ),
        teach=ranked,
        roles=frozenset({"reference", "reward"}),
        fewest_answers=2,
        settings=OnlineDpoSettings(),
    ),
}


def algorithm(name: str) -> Algorithm:
    """The row of this name; an unknown name is a ConfigError."""
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(ALGORITHMS)}"
        raise ConfigError(f"algorithm={name!r}: there is no such row; {advice}")
    return ALGORITHMS[name]


def preference_algorithm(name: str) -> Algorithm:
    """The row of this name, one that teaches a policy people's judgements; any other name is a ConfigError."""
    row = algorithm(name)
    if row.implicit_reward is None or row.samples:
        known = ", ".join(
            known for known, other in ALGORITHMS.items() if other.implicit_reward is not None and not other.samples
        )
        raise ConfigError(f"algorithm={name!r}: does not learn from preferences; those that do: {known}")
    return row
