"""Alarms with remedies: a verdict on each number that fails silently, and the setting to turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Level = Literal["ok", "warn", "stop"]
Finding = tuple[Level, float, str]
"""How bad, which value, and why in plain words."""


@dataclass(frozen=True)
class Verdict:
    """What a metric says about the run."""

    metric: str
    level: Level
    value: float
    """The number judged: of the recent steps, or the worst of all; `reason` says which. NaN: it was not finite."""
    reason: str
    setting: str
    """What to turn, and which way, if it is not well."""


@dataclass(frozen=True)
class History:
    """A stage's rows of metrics.jsonl and its settings."""

    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    def of(self, name: str) -> list[float]:
        """The finite values of this metric, in order."""
        return [float(row[name]) for row in self.rows if row.get(name) is not None]

    def broken(self, name: str) -> int:
        """How many values were not finite."""
        return sum(name in row and row[name] is None for row in self.rows)

    def number(self, path: str, default: float) -> float:
        """A number among the settings, by its dotted path."""
        value = self._setting(path)
        return float(value) if isinstance(value, int | float) else default

    def bounds(self, metric: str) -> tuple[float, float]:
        """Where to warn and where to stop: the run's own, or the table's."""
        own = self._setting("health.bounds")
        warn, stop = own[metric] if isinstance(own, Mapping) and metric in own else BOUNDS[metric]
        return float(warn), float(stop)

    def text(self, path: str) -> str:
        """A word among the settings; empty if it is not set."""
        value = self._setting(path)
        return value if isinstance(value, str) else ""

    def _setting(self, path: str) -> Any:
        value: Any = self.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Check:
    """One row of the table: `judge` is asked only when the metric has finite values."""

    metric: str
    judge: Callable[[History, list[float]], Finding | None]
    setting: str


BOUNDS: Mapping[str, tuple[float, float]] = {
    "gradient/norm": (10, math.inf),  # times its median
    "loss/heldout": (1.05, math.inf),  # times its lowest
    "accuracy/heldout": (0.6, 0.5),  # a reward model's; below
    "ratio/first_max_error": (1e-3, 1e-2),
    "engine/max_logprob_difference": (1e-3, 1e-1),
    "reward/score_mean": (2.0, 4.0),  # standard errors that gold has fallen from its best while the score has not
    "reward/score_std": (1e-3, 0.0),  # below
    "reward/clipped_share": (0.1, 0.5),
    "reward/length_correlation": (0.5, math.inf),  # either way; length may be what people want
    "reward/failed_share": (0.0, 0.5),
    "kl/reference_per_answer": (2, 4),  # times the target
    "kl/update_approx": (0.02, 0.1),
    "clip/share": (0.3, 0.6),
    "entropy/per_token": (0.5, 0.1),  # below: a share of the first, nats
    "value/explained_variance": (0.0, -math.inf),  # below
    "groups/alike_share": (0.9, 0.999),
    "length/mean_tokens": (2, math.inf),  # times the first, or a part of it
    "finished/share": (0.2, 1.0),  # fall from the first
    "distinct/share": (0.5, 0.05),  # below: a share of the first, itself
    "memory/rss_gb": (1.15, math.inf),  # times what it was in the run's second quarter
    "loss/ptx": (0.05, 0.2),  # rise over the first, as a share of it
}
"""By metric, beyond which value to warn and to stop; settings.health.bounds overrules it."""


def verdicts(stage: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None) -> list[Verdict]:
    """A verdict for every number of this kind of stage that has a row below and was measured.

    `settings` are the stage's own (its KL target, its length limit); without them rules of thumb stand in.
    """
    history = History(rows, settings or {})
    found = []
    for check in CHECKS.get(stage, ()):
        if broken := history.broken(check.metric):
            reason = f"{broken} of {len(rows)} steps gave no finite number: the weights may be ruined"
            found.append(Verdict(check.metric, "stop", math.nan, reason, check.setting))
        elif values := history.of(check.metric):
            finding = check.judge(history, values)
            if finding is not None:
                found.append(Verdict(check.metric, *finding, check.setting))
    return found


def first_alarm(stage: str, metric: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> int | None:
    """The step after which this number was first bad enough to stop, by what was known then; None if it never was.

    Of a long run 200 steps are looked at.
    """
    for check in CHECKS.get(stage, ()):
        ends = range(0, len(rows), math.ceil(len(rows) / 200)) if check.metric == metric else ()
        for end in ends:
            history = History(rows[: end + 1], settings)
            values = history.of(metric)
            finding = check.judge(history, values) if values else None
            if history.broken(metric) or (finding and finding[0] == "stop"):
                return int(rows[end]["step"])
    return None


# How a series is read. One step is noise: verdicts look at the first and the last quarter of a run.


def _quarter(values: Sequence[float]) -> int:
    return max(1, len(values) // 4)


def _early(values: Sequence[float]) -> float:
    return statistics.fmean(values[: _quarter(values)])


def _recent(values: Sequence[float]) -> float:
    return statistics.fmean(values[-_quarter(values) :])


def _trend(values: Sequence[float]) -> int:
    """+1 rose, -1 fell, 0 neither: by more than two standard errors between the first and the last third."""
    third = len(values) // 3
    if third < 2:
        return 0
    first, last = values[:third], values[-third:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    change = statistics.fmean(last) - statistics.fmean(first)
    return 0 if abs(change) <= 2 * error else (1 if change > 0 else -1)


def _fall(scores: Sequence[float], gold: Sequence[float]) -> float:
    """How far gold has fallen from its best three rounds to the last three, in standard errors; 0 if the score fell.

    A round's error is read off the differences between neighbours, so a steady trend counts as some error.
    """
    if len(gold) < 6:
        return 0.0
    windows = [statistics.fmean(gold[i : i + 3]) for i in range(len(gold) - 5)]
    best = max(range(len(windows)), key=windows.__getitem__)
    error = math.sqrt(statistics.fmean((b - a) ** 2 for a, b in pairwise(gold)) / 2)
    if not error or statistics.fmean(scores[-3:]) < statistics.fmean(scores[best : best + 3]):
        return 0.0
    return (windows[best] - statistics.fmean(gold[-3:])) / (error * math.sqrt(2 / 3))


def _limits(value: float, warn: float, stop: float) -> Level:
    return "stop" if value > stop else "warn" if value > warn else "ok"


# The judges, one for each row of the table


def _gradient(history: History, values: list[float]) -> Finding:
    usual, worst = statistics.median(values), max(values)
    warn, stop = history.bounds("gradient/norm")
    if worst > stop * usual > 0:
        return "stop", worst, f"one step pulled {worst / usual:.0f} times as hard as usual ({usual:.3g})"
    if worst > warn * usual > 0:
        return "warn", worst, f"one step pulled {worst / usual:.0f} times as hard as usual ({usual:.3g})"
    return "ok", worst, f"steady: the largest is {worst / usual:.1f} times the usual" if usual else "nothing pulls"


def _train_loss(history: History, values: list[float]) -> Finding:
    if _trend(values) > 0:
        return "warn", _recent(values), f"rises: it was {_early(values):.3f} at first"
    return "ok", _recent(values), f"it was {_early(values):.3f} at first"


def _heldout_loss(history: History, values: list[float]) -> Finding | None:
    if len(values) < 2:
        return None
    if values[-1] >= values[0]:
        return "warn", values[-1], f"did not fall (it was {values[0]:.3f}): nothing was learnt that carries over"
    if values[-1] > history.bounds("loss/heldout")[0] * min(values):
        return "warn", values[-1], f"has risen again from its best, {min(values):.3f}: examples are learnt by heart"
    return "ok", values[-1], f"fell from {values[0]:.3f}"


def _reward_loss(history: History, values: list[float]) -> Finding:
    if values[-1] >= math.log(2):
        return "warn", values[-1], "no better than a coin toss (0.693): too sure where it is wrong"
    return "ok", values[-1], "better than a coin toss (0.693)"


def _reward_accuracy(history: History, values: list[float]) -> Finding | None:
    if len(values) < 2:
        return None  # of the first weights, before anything is learnt
    warn, stop = history.bounds("accuracy/heldout")
    if values[-1] <= stop:
        return "stop", values[-1], "orders new pairs no better than a coin toss: there is nothing to optimise"
    if values[-1] <= warn:
        return "warn", values[-1], "hardly better than a coin toss; a policy will soon find its errors"
    return "ok", values[-1], "orders pairs it has never seen well enough to learn from"


def _preference_accuracy(history: History, values: list[float]) -> Finding:
    if values[-1] <= 0.5:
        return "warn", values[-1], "tells new answers apart no better than a coin toss: nothing carries over"
    return "ok", values[-1], "tells apart answers it has never seen"


def _chosen(history: History, values: list[float]) -> Finding:
    first, recent = _early(values), _recent(values)
    # Both may fall while the margin rises: what takes their place is then said by nobody.
    if recent < first - max(10.0, 0.5 * abs(first)):
        return "warn", recent, f"preferred answers have become much rarer too (from {first:.1f} nats)"
    return "ok", recent, f"preferred answers are still likely (from {first:.1f} nats)"


def _first_ratio(history: History, values: list[float]) -> Finding | None:
    if history.text("model.dtype") == "bfloat16":
        return None  # Rounding alone moves it by some 0.05 there.
    worst = max(values)
    level = _limits(worst, *history.bounds("ratio/first_max_error"))
    equal = "new and old probabilities agree before the first update, as they must"
    return level, worst, equal if level == "ok" else "the policy that learns is not quite the one that sampled"


def _engine(history: History, values: list[float]) -> Finding | None:
    if history.text("model.dtype") == "bfloat16":
        return None
    worst = max(values)
    level = _limits(worst, *history.bounds("engine/max_logprob_difference"))
    return level, worst, "the sampler and the trainer agree" if level == "ok" else "the sampler sees another policy"


def _score(history: History, values: list[float]) -> Finding:
    recent, trend = _recent(values), _trend(values)
    gold = history.of("gold/mean")
    if len(gold) == len(values):
        level = _limits(_fall(values, gold), *history.bounds("reward/score_mean"))
        if level != "ok":
            return level, recent, "the gold preference falls while the score does not: the reward model is being fooled"
        if trend > 0 and _trend(gold) <= 0:
            return "warn", recent, "the score rises and the gold preference does not follow"
        if trend > 0:
            return "ok", recent, "rises, and the gold preference with it"
    if trend < 0:
        return "warn", recent, f"falls: it was {_early(values):+.2f} at first"
    return "ok", recent, "rises" if trend > 0 else "no clear movement yet"


def _score_spread(history: History, values: list[float]) -> Finding:
    recent = _recent(values)
    if recent < history.bounds("reward/score_std")[0]:
        return "warn", recent, "all answers score the same, so there is nothing to learn from"
    return "ok", recent, "answers differ in score, so there is something to learn from"


def _score_clipped(history: History, values: list[float]) -> Finding:
    recent = _recent(values)
    level = _limits(recent, *history.bounds("reward/clipped_share"))
    if level == "ok":
        return level, recent, "scores lie within their clip"
    return level, recent, "better and worse answers get the same clipped score: it was normalised on other answers"


def _score_length(history: History, values: list[float]) -> Finding:
    recent = _recent(values)
    level = _limits(abs(recent), *history.bounds("reward/length_correlation"))
    if level == "ok":
        return level, recent, "the score is not a matter of length"
    return (
        level,
        recent,
        f"the score follows length: {'longer' if recent > 0 else 'shorter'} is better",
    )


def _groups(history: History, values: list[float]) -> Finding:
    recent = _recent(values)
    level = _limits(recent, *history.bounds("groups/alike_share"))
    if level == "ok":
        return level, recent, "answers to one prompt differ in score"
    return level, recent, "the answers to most prompts all score the same, and teach nothing"


def _failed(history: History, values: list[float]) -> Finding:
    # A failure that is over still lies in what was learnt: it warns to the end, and only a recent one stops.
    recent, worst = _recent(values), max(values)
    warn, stop = history.bounds("reward/failed_share")
    if worst <= warn:
        return "ok", recent, "every part graded every answer"
    level: Level = "stop" if recent > stop else "warn"
    return level, worst, "at worst so many answers of a step met a part that failed; they learn its failure"


def _kl_reference(history: History, values: list[float]) -> Finding:
    aim = {"proportional": "kl.target_per_answer", "band": "kl.high_per_answer"}.get(history.text("kl.controller"))
    target = history.number(aim, 10.0) if aim else 10.0
    recent = _recent(values)
    if len(values) >= 3 and all(value < -0.05 for value in values[-3:]):
        return "stop", recent, "negative three times running, which no distance can be: samples and scores differ"
    level = _limits(recent / target, *history.bounds("kl/reference_per_answer"))
    if level == "ok":
        return level, recent, f"the policy has stayed near the model it started from (up to {target:g} is near)"
    return level, recent, f"the policy has gone {recent / target:.1f} times as far as is wise ({target:g})"


def _kl_update(history: History, values: list[float]) -> Finding:
    recent = _recent(values)
    level = _limits(recent, *history.bounds("kl/update_approx"))
    if level != "ok":
        return level, recent, "each step moves the policy too far for what it has sampled"
    return level, recent, "steps are small; learning could be faster" if recent < 4e-5 else "steps of a sound size"


def _clipped(history: History, values: list[float]) -> Finding:
    recent = _recent(values)
    level = _limits(recent, *history.bounds("clip/share"))
    return level, recent, "few tokens reach the clip" if level == "ok" else "much of what is learnt is thrown away"


def _entropy(history: History, values: list[float]) -> Finding:
    first, recent = _early(values), _recent(values)
    warn, stop = history.bounds("entropy/per_token")
    if recent < stop:
        return "stop", recent, "the policy hardly chooses any more: it says the same thing every time"
    if recent < first * warn:
        return "warn", recent, f"fell by more than half (it was {first:.2f}): answers become alike"
    return "ok", recent, f"still undecided enough to explore (it was {first:.2f})"


def _critic(history: History, values: list[float]) -> Finding | None:
    learnt = values[int(history.number("value.warmup_steps", 0)) :]
    if not learnt:
        return None
    recent = _recent(learnt)
    if recent < history.bounds("value/explained_variance")[0]:
        return "warn", recent, "the critic forecasts worse than a constant would, which adds noise to every step"
    return "ok", recent, "the critic foresees most of it" if recent >= 0.5 else "the critic foresees part of it"


def _length(history: History, values: list[float]) -> Finding:
    first, recent = max(1.0, values[0]), _recent(values)
    limit = history.number("rollout.max_new_tokens", math.inf)
    if recent >= limit - 0.01:
        return "stop", recent, f"every answer meets the limit of {limit:.0f} tokens"
    if recent <= 1:
        return "stop", recent, "answers are empty"
    if max(recent / first, first / recent) > history.bounds("length/mean_tokens")[0]:
        return "warn", recent, f"from {first:.0f} tokens to {recent:.0f}: the score may reward length itself"
    return "ok", recent, f"between half and twice what it was ({first:.0f})"


def _finished(history: History, values: list[float]) -> Finding:
    first, recent = values[0], _recent(values)
    if recent == 0:
        return "stop", recent, "no answer comes to an end"
    if recent < first - history.bounds("finished/share")[0]:
        return "warn", recent, f"fewer answers come to an end than at first ({100 * first:.0f} %)"
    return "ok", recent, f"answers come to an end as at first ({100 * first:.0f} %)"


def _distinct(history: History, values: list[float]) -> Finding:
    first, recent = values[0], _recent(values)
    warn, stop = history.bounds("distinct/share")
    if recent < stop:
        return "stop", recent, "one answer for all prompts"
    if recent < first * warn:
        return "warn", recent, f"answers repeat one another twice as much as at first ({100 * first:.0f} %)"
    return "ok", recent, f"about as varied as at first ({100 * first:.0f} %)"


def _rehearsal(history: History, values: list[float]) -> Finding:
    recent, drift = _recent(values), _recent(values) / _early(values) - 1
    level = _limits(drift, *history.bounds("loss/ptx"))
    if level == "ok":
        return level, recent, f"what was learnt from demonstrations is kept ({100 * drift:+.0f} %)"
    return level, recent, f"demonstrations are being forgotten ({100 * drift:+.0f} %)"


def _memory(history: History, values: list[float]) -> Finding | None:
    # The first quarter meets the longest texts; of fewer steps nothing can be said.
    if len(values) < 20:
        return None
    recent, before = _recent(values), statistics.fmean(values[_quarter(values) : 2 * _quarter(values)])
    level = _limits(recent / before, *history.bounds("memory/rss_gb"))
    if level == "ok":
        return level, recent, f"flat: it was {before:.2f} GB early in the run"
    return level, recent, f"grows: it was {before:.2f} GB early in the run"


_MEMORY = Check(
    "memory/rss_gb", _memory, "training.micro_batch_tokens; if it still grows, report it as a fault of ours"
)
_GRADIENT = Check("gradient/norm", _gradient, "lower optimizer.learning_rate or raise optimizer.warmup_steps")

CHECKS: Mapping[str, tuple[Check, ...]] = {
    "sft": (
        Check("loss/train", _train_loss, "lower optimizer.learning_rate"),
        Check("loss/heldout", _heldout_loss, "fewer training.epochs, or more demonstrations"),
        _GRADIENT,
        _MEMORY,
    ),
    "reward": (
        Check("accuracy/heldout", _reward_accuracy, "more rankings, a lower optimizer.learning_rate, or fewer epochs"),
        Check("loss/heldout", _reward_loss, "fewer training.epochs or a lower optimizer.learning_rate"),
        _GRADIENT,
        _MEMORY,
    ),
    "dpo": (
        Check("accuracy/heldout", _preference_accuracy, "more rankings, or another optimizer.learning_rate"),
        Check(
            "loss/heldout", _heldout_loss, "fewer training.epochs, a lower optimizer.learning_rate, or more rankings"
        ),
        Check("logprobs/chosen", _chosen, "lower optimizer.learning_rate, or fewer training.epochs"),
        _GRADIENT,
        _MEMORY,
    ),
    "ppo": (
        Check("reward/score_mean", _score, "stop earlier, raise kl.coef, or train the reward model on newer answers"),
        Check("reward/score_std", _score_spread, "raise rollout.temperature; see the reward model's held-out accuracy"),
        Check("reward/clipped_share", _score_clipped, "normalise_on in the reward stage: the SFT model's own answers"),
        Check(
            "reward/length_correlation", _score_length, "rank answers of all lengths, if length is not what people want"
        ),
        Check("groups/alike_share", _groups, "raise rollout.temperature, or choose prompts of middling difficulty"),
        Check("reward/failed_share", _failed, "mend the part that the warning names, or raise its timeout_seconds"),
        Check("kl/reference_per_answer", _kl_reference, "raise kl.coef, or lower optimizer.learning_rate"),
        Check("kl/update_approx", _kl_update, "optimizer.learning_rate and reuse: lower them if it is too large"),
        Check("clip/share", _clipped, "lower optimizer.learning_rate or reuse"),
        Check("entropy/per_token", _entropy, "raise kl.coef or settings.entropy_coef"),
        Check("value/explained_variance", _critic, 'value.start="reward", or more value.warmup_steps'),
        Check("length/mean_tokens", _length, "read the samples; raise kl.coef, or rank answers of all lengths"),
        Check("finished/share", _finished, 'truncated="penalty", or a larger rollout.max_new_tokens'),
        Check("distinct/share", _distinct, "raise kl.coef, or stop earlier"),
        Check("ratio/first_max_error", _first_ratio, "run `dressage doctor`: dropout, or two temperatures"),
        Check("engine/max_logprob_difference", _engine, "rollout.engine, or rollout.reuse_engine_logprobs=false"),
        Check("loss/ptx", _rehearsal, "raise settings.ptx_coef or kl.coef"),
        _GRADIENT,
        _MEMORY,
    ),
}
"""By kind of stage; the order is that of the report."""
