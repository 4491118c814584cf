"""What every logged number is called, measured in, and means: one table for the console, the report and the docs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One logged number, explained to somebody who meets it for the first time."""

    name: str
    unit: str
    """Empty for a plain number; "share" is between 0 and 1 and shown in per cent."""
    meaning: str
    healthy: str = ""
    """How it should look; empty: depends on the run."""
    decimals: int = 3

    def show(self, value: float | None) -> str:
        """The value as a person reads it, with its unit."""
        if value is None or not math.isfinite(value):
            return "not a number"
        if self.unit == "share":
            return f"{100 * value:.{self.decimals}f}\u00a0%"
        small = value != 0 and abs(value) < 0.5 * 10**-self.decimals
        number = f"{value:.1e}" if small else f"{value:,.{self.decimals}f}"
        # A true minus sign, as wide as a plus; only the first: that of an exponent belongs to the notation.
        number = "\u2212" + number[1:] if number.startswith("-") else number
        return f"{number}\u00a0{self.unit}" if self.unit else number


_TABLE = (
    # What all learning stages log
    Metric(
        "loss/train",
        "nats",
        "How surprised the model is by what it learns from: by a token (sft), or by a person's choice between two "
        "answers (reward, dpo; a coin toss would be 0.693 = ln 2; ipo, kto and orpo have scales of their own). 0 is "
        "perfect.",
        "falls, first fast, then slowly",
    ),
    Metric(
        "loss/heldout",
        "nats",
        "The same on examples it never learns from, so it cannot be lowered by learning them by heart.",
        "falls with the training loss; when it rises again, stop earlier",
    ),
    Metric(
        "end/heldout",
        "share",
        "How likely the end mark is where held-out answers end.",
        "rises, unless the model could end its answers before",
        decimals=1,
    ),
    Metric(
        "gradient/norm",
        "",
        "How strongly the whole batch pulls at the weights, before the pull is cut to its limit.",
        "steady; no jumps to ten times its usual size",
    ),
    Metric("learning_rate", "", "How far one update may move the weights.", decimals=6),
    Metric("tokens_per_second", "tokens/s", "Tokens (word pieces) that go through the stage in a second.", decimals=0),
    Metric(
        "memory/rss_gb",
        "GB",
        "What the program has in RAM after the step.",
        "flat once the longest texts have been seen",
        decimals=2,
    ),
    # Reward model
    Metric(
        "accuracy/train",
        "share",
        "Of the pairs it learns from, how many the model puts in the same order as the ranker (kto: of the rated "
        "answers, how many lie on the right side).",
        "rises above 60 %",
        decimals=0,
    ),
    Metric(
        "accuracy/heldout",
        "share",
        "The same on prompts it never learns from. 50 % is a coin toss; people agree with one another on 60 to 80 %.",
        "above 60 %, and above what 'the longer is better' would reach",
        decimals=0,
    ),
    Metric(
        "margin/train",
        "",
        "By how much the better answer's reward beats the worse one's, in the pairs it learns from. A policy's reward "
        "of an answer is read from how likely it makes the answer (dpo and its relatives).",
        "rises slowly; a large one is learnt by heart",
    ),
    Metric("margin/heldout", "", "The same on prompts it never learns from.", "rises with the training margin"),
    # Learning straight from preferences
    Metric(
        "logprobs/chosen",
        "nats",
        "Log-probability of a whole answer that people preferred (kto: found good).",
        "steady or rising; a slow fall is usual, after a steep one the policy says what nobody has judged",
        decimals=1,
    ),
    Metric(
        "logprobs/rejected",
        "nats",
        "Log-probability of a whole answer that people did not prefer (kto: found bad).",
        "falls, not without end",
        decimals=1,
    ),
    Metric("logprobs/chosen_heldout", "nats", "The same of preferred answers it never learns from.", decimals=1),
    Metric("logprobs/rejected_heldout", "nats", "The same of the others it never learns from.", decimals=1),
    Metric(
        "kl/unrelated_per_answer",
        "nats",
        "KTO's yardstick: how much likelier than the starting model the policy finds answers that belong to other "
        "prompts. A good answer is to beat it, a bad one to stay below; below 0 it counts as 0.",
    ),
    # What PPO is for
    Metric(
        "reward/score_mean",
        "",
        "The score of a step's answers: the reward model's, scaled so that the starting model's answers have mean 0 "
        "and deviation 1, or the weighted sum of the reward's parts.",
        "rises",
    ),
    Metric(
        "reward/score_std",
        "",
        "How much that score differs between the answers of a step. Without a difference nothing can be learnt.",
        "above 0.001",
    ),
    Metric(
        "reward/clipped_share",
        "share",
        "Answers whose score met the clip: among them better and worse look alike.",
        "near 0 %",
        decimals=1,
    ),
    Metric(
        "reward/length_correlation",
        "",
        "How far the score follows an answer's length: 1 longer is always better, -1 shorter is, 0 neither.",
        "between -0.5 and 0.5, unless length is what people want",
        decimals=2,
    ),
    Metric(
        "reward/total_mean",
        "",
        "The score less the price of moving away from the starting model (KL) and of being cut off: what is maximised.",
        "rises",
    ),
    Metric(
        "reward/failed_share",
        "share",
        "Answers that some part of the reward could not grade: it raised, hung or gave no finite number. They have "
        "that part's score on failure, and learning goes on.",
        "0 %; the first failure of each part is told on the screen, with its reason",
        decimals=1,
    ),
    Metric(
        "gold/mean",
        "",
        "What the score only approximates, never trained on: the hidden preference of the simulated annotator, or the "
        "part of the reward that the setting `gold` names.",
        "rises with the score; score up and gold down means the reward model is being fooled",
    ),
    # How far the policy has gone
    Metric(
        "kl/reference_per_answer",
        "nats",
        "How far the policy has moved from the starting model: the log of how many times likelier it makes its own "
        "answers, a whole answer at a time.",
        "slowly up to a few nats, not without end",
    ),
    Metric(
        "kl/full_per_token",
        "nats/token",
        "The same distance without luck: over every token the model might have said, for an average place.",
        "slowly up",
        decimals=4,
    ),
    Metric("kl/coef", "", "Price of one nat of that distance, in units of the reward."),
    Metric("kl/old_coef", "", "Price of one nat away from the policy that wrote the answers, in the loss."),
    Metric(
        "kl/update_approx",
        "nats/token",
        "How far the updates of one step moved the policy, for an average token.",
        "0.0004 to 0.01",
        decimals=4,
    ),
    Metric(
        "updates/made_share",
        "share",
        "Of the updates that a step had in store, those made before the policy had gone too far.",
        decimals=0,
    ),
    Metric(
        "trust_region/kl",
        "nats/token",
        "How far the bounded update moved the policy, over the whole vocabulary; 0: no step was good enough to take.",
        "above 0, and below settings.max_kl",
        decimals=4,
    ),
    Metric(
        "groups/alike_share",
        "share",
        "Prompts whose answers all scored the same: compared with each other they teach nothing.",
        "below 50 %",
        decimals=0,
    ),
    Metric(
        "kept/share",
        "share",
        "Of a step's answers, those learnt from: selected as the best, or in a pair of which one is better.",
        "above 0",
        decimals=0,
    ),
    Metric(
        "clip/share",
        "share",
        "Tokens whose probability had changed so much that PPO's clip held them back.",
        "below 20 %",
        decimals=1,
    ),
    Metric("clip/value_share", "share", "Tokens whose value estimate was held back by the value clip.", decimals=1),
    Metric(
        "entropy/per_token",
        "nats",
        "How undecided the policy is about the next token: 0 is always the same token, 0.7 a choice between two.",
        "falls slowly; not by half, not to 0",
    ),
    Metric(
        "value/explained_variance",
        "",
        "How much of the difference between answers the critic foresees: 1 all, 0 none, below 0 worse than a constant.",
        "rises to 0.5 and more",
        decimals=2,
    ),
    # Losses and gradients
    Metric("loss/policy", "", "What is maximised of the policy, negated. Its size says little; it hovers about 0."),
    Metric("loss/kl", "", "Price of moving away from the starting model, where it stands in the loss."),
    Metric("loss/old_kl", "", "Price of moving away from the policy that wrote the answers."),
    Metric("loss/value", "", "Squared error of the critic's forecast of the reward.", "falls"),
    Metric(
        "loss/ptx",
        "nats",
        "Loss on demonstrations that are rehearsed beside the reward, so that what was learnt is not lost.",
        "rises by less than 5 %",
    ),
    # What the answers look like
    Metric(
        "length/mean_tokens",
        "tokens",
        "Length of an answer, its end mark included.",
        "between half and twice the starting model's",
        decimals=1,
    ),
    Metric(
        "finished/share",
        "share",
        "Answers that the policy ended itself; the others were cut at the length limit.",
        "as high as the starting model's",
        decimals=0,
    ),
    Metric(
        "distinct/share",
        "share",
        "How varied a step's answers are: of all pairs of neighbouring words in them, the share that differ. 100 % if "
        "no phrase occurs twice.",
        "like the starting model's; not half of it",
        decimals=0,
    ),
    # Is the machinery sound?
    Metric(
        "ratio/first_max_error",
        "",
        "At the first minibatch nothing has been learnt yet, so new and old probability of every token must be equal: "
        "the largest departure of their ratio from 1.",
        "below 0.001",
        decimals=6,
    ),
    Metric(
        "engine/max_logprob_difference",
        "nats",
        "Largest difference between a token's log-probability as sampled and as recomputed for learning (of one "
        "answer, where the sampler's are then taken).",
        "below 0.001 in float32",
        decimals=6,
    ),
    # Where the time goes
    Metric("time/rollout_seconds", "s", "Seconds of a step spent writing answers.", decimals=2),
    Metric("time/rollout_tokens_per_second", "tokens/s", "Tokens of answers written in a second of that.", decimals=0),
    Metric("time/score_seconds", "s", "Seconds of a step spent scoring them.", decimals=2),
    Metric("time/update_seconds", "s", "Seconds of a step spent learning.", decimals=2),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}


PART = "reward/part/"
"""Before the name of a part of the reward, which a recipe gives."""


def metric(name: str) -> Metric:
    """The row of this name; a name the table does not have is shown without explanation."""
    if name.startswith(PART):
        meaning = f"Mean score of a step's answers by the reward's part {name.removeprefix(PART)!r}, before its weight."
        return Metric(name, "", meaning, "rises, unless its weight is negative")
    return METRICS.get(name) or Metric(name, "", "")


def declared(name: str) -> bool:
    """Is it in the table, or one of a recipe's own parts?"""
    return name in METRICS or name.startswith(PART)
