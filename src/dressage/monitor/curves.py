"""Which numbers are drawn together, and the report's section of curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from dressage.monitor.charts import Flag, Line, Mark, Point, line_chart
from dressage.monitor.health import first_alarm
from dressage.monitor.metrics import metric
from dressage.monitor.page import Html, Say, el, join
from dressage.monitor.run_folder import Stage, logged, number


@dataclass(frozen=True)
class Curve:
    """A metric on a chart."""

    name: str
    label: str
    right: bool = False
    """On an axis of its own: it has another unit or size than the others."""


@dataclass(frozen=True)
class Chart:
    """Curves that belong together."""

    title: str
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...] = ()
    note: str = ""
    """Empty: what is healthy for the first curve."""
    aside: bool = False
    """Among "More curves"."""


_LOSS = (Curve("loss/train", "training"), Curve("loss/heldout", "held-out"))
_ACCURACY = (Curve("accuracy/train", "training"), Curve("accuracy/heldout", "held-out"))
_MARGIN = (Curve("margin/train", "training"), Curve("margin/heldout", "held-out"))
_ANSWERS = (
    Curve("logprobs/chosen", "preferred"),
    Curve("logprobs/rejected", "not preferred"),
    Curve("logprobs/chosen_heldout", "preferred, held-out"),
    Curve("logprobs/rejected_heldout", "not preferred, held-out"),
)
_REWARD = (
    Curve("reward/score_mean", "score"),
    Curve("reward/total_mean", "score less KL"),
    Curve("gold/mean", "gold preference", right=True),
)
_FORM = (Curve("finished/share", "finished"), Curve("distinct/share", "distinct"))
_TIME = (
    Curve("time/rollout_seconds", "answering"),
    Curve("time/score_seconds", "scoring"),
    Curve("time/update_seconds", "learning"),
)
_WATCH_THE_GAP = "Healthy: both rise. When the score goes on rising and gold does not, the reward model is fooled."

CHARTS: Mapping[str, tuple[Chart, ...]] = {
    "sft": (Chart("Loss", _LOSS),),
    "reward": (
        Chart("Pairs ordered rightly", _ACCURACY, (Mark(0.5, "coin toss"),)),
        Chart("Loss", _LOSS, (Mark(math.log(2), "coin toss"),)),
    ),
    "dpo": (
        Chart("Pairs ordered rightly", _ACCURACY, (Mark(0.5, "coin toss"),)),
        Chart("Loss", _LOSS),
        Chart("Margin between better and worse", _MARGIN),
        Chart("Log-probability of an answer", _ANSWERS),
    ),
    "ppo": (
        Chart("Score and gold preference", _REWARD, note=_WATCH_THE_GAP),
        Chart("Distance from the starting model", (Curve("kl/reference_per_answer", "KL per answer"),)),
        Chart("Length of an answer", (Curve("length/mean_tokens", "mean"),)),
        Chart("Finished and distinct answers", _FORM),
        Chart("Entropy", (Curve("entropy/per_token", "per token"),)),
        Chart(
            "What the critic foresees",
            (Curve("value/explained_variance", "explained variance"),),
            (Mark(0.0, "no better than a constant"),),
        ),
        Chart(
            "Size of the updates",
            (Curve("kl/update_approx", "approximate KL"), Curve("clip/share", "clipped", right=True)),
        ),
        Chart(
            "Losses of policy and critic", (Curve("loss/policy", "policy"), Curve("loss/value", "critic", right=True))
        ),
        Chart("Rehearsed demonstrations", (Curve("loss/ptx", "loss"),)),
        Chart("Where the time goes", _TIME, aside=True),
    ),
}
"""By kind of stage; every other number that it logged follows under "More curves"."""


def curves_section(stages: Sequence[Stage], say: Say) -> Html:
    """All curves of all stages, those of the policy's last training first: they are what the run is about."""
    shown: list[Html] = []
    more: list[Html] = []
    for stage in sorted(stages, key=lambda one: one.kind not in ("ppo", "dpo")):
        planned = CHARTS.get(stage.kind, ())
        drawn = {curve.name for chart in planned for curve in chart.curves}
        others = [Chart(name, (Curve(name, "value"),), aside=True) for name in logged([stage]) if name not in drawn]
        for chart in (*planned, *others):
            if card := _card(stage, chart, say):
                (more if chart.aside else shown).append(card)
            if chart.curves is _REWARD and (distances := by_distance(stage.rows)):
                shown.append(_distances(stage, distances, say))
    if not shown and not more:
        return Html()
    aside = el("details", el("summary", say("More curves")), el("div.charts", *more)) if more else Html()
    return join(el("h2", say("Curves")), el("div.charts", *shown), aside)


def _card(stage: Stage, chart: Chart, say: Say) -> Html:
    """Title, legend, picture and what is healthy; nothing if none of its numbers were logged."""
    lines = []
    for colour, curve in enumerate(chart.curves):
        rows = [row for row in stage.rows if curve.name in row and "step" in row]
        points = [Point(row["step"], number(row, curve.name)) for row in rows]
        if any(point.value is not None for point in points):
            lines.append(Line(say(curve.label), metric(curve.name), points, colour, curve.right))
    if not lines:
        return Html()
    if all(line.right for line in lines):
        lines = [replace(line, right=False) for line in lines]
    legend = [el(f"li.c{line.colour}", el("span", _legend(line, say))) for line in lines]
    marks = [Mark(mark.value, say(mark.label)) for mark in chart.marks]
    alarms = [first_alarm(stage.kind, curve.name, stage.rows, stage.settings) for curve in chart.curves]
    flags = [Flag(step, say("alarm")) for step in alarms if step is not None]
    notes = [say(chart.note) if chart.note and len(lines) > 1 else _healthy(lines[0], say)]
    if any(line.right for line in lines):
        notes.append(say("Two scales: compare when the curves rise and fall, not how high they are."))
    return el(
        "figure.card.plot",
        el("h4", say(chart.title), el("span", stage.name)),
        el("ul.legend", *legend),
        line_chart(lines, title=say(chart.title), step_word=say("step"), marks=marks, flags=flags),
        el("p.note", " ".join(filter(None, notes))),
    )


@dataclass(frozen=True)
class Distance:
    """The rounds in which the policy was at most so far from the reference, and farther than the budget before."""

    kl: float
    """Nats an answer."""
    rounds: int
    score: float
    gold: float


def by_distance(rows: Sequence[Mapping[str, Any]]) -> list[Distance]:
    """Mean score and gold by KL budgets that double: what Gao et al. 2023 plot against the root of the KL."""
    found: dict[float, list[tuple[float, float]]] = {}
    for row in rows:
        kl, score, gold = (number(row, name) for name in ("kl/reference_per_answer", "reward/score_mean", "gold/mean"))
        if kl is not None and score is not None and gold is not None:
            budget = 2.0 ** math.ceil(math.log2(max(kl, 0.25)))
            found.setdefault(budget, []).append((score, gold))
    return [
        Distance(budget, len(pairs), fmean(score for score, _ in pairs), fmean(gold for _, gold in pairs))
        for budget, pairs in sorted(found.items())
    ]


def _distances(stage: Stage, distances: Sequence[Distance], say: Say) -> Html:
    best = max(distances, key=lambda one: one.gold)
    rows = [
        el(
            "tr",
            el("td", f"{one.kl:g}"),
            el("td", f"{one.rounds}"),
            el("td", f"{one.score:+.2f}"),
            el("td", el("b", f"{one.gold:+.2f}") if one is best else f"{one.gold:+.2f}"),
        )
        for one in distances
    ]
    heads = [el("th", say(head)) for head in ("KL up to", "rounds", "score", "gold preference")]
    return el(
        "figure.card.plot",
        el("h4", say("Score and gold by distance"), el("span", stage.name)),
        el("table", el("thead", el("tr", *heads)), el("tbody", *rows)),
        el("p.note", say("Where gold is highest the policy was at its best; what it gained beyond only looks better.")),
    )


def _legend(line: Line, say: Say) -> str:
    last = next((point.value for point in reversed(line.points) if point.value is not None), None)
    axis = f" ({say('right axis')})" if line.right else ""
    return f"{line.label}{axis}: {line.metric.show(last)}"


def _healthy(line: Line, say: Say) -> str:
    return f"{say('Healthy')}: {line.metric.healthy}." if line.metric.healthy else ""
