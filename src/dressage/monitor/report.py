"""One HTML file that tells what a run did, whether it worked, and whether it is healthy: to read, keep and send."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dressage.errors import DataError
from dressage.monitor.curves import curves_section
from dressage.monitor.health import Level, Verdict, verdicts
from dressage.monitor.metrics import metric
from dressage.monitor.page import CHINESE, Html, Language, Say, el, join, page
from dressage.monitor.run_folder import Stage, logged, number, read_json, read_stages, says_simulated
from dressage.monitor.writers import clock, write_whole

EXAMPLES_SHOWN = 12

WHAT: Mapping[str, str] = {
    "sft": "learns from demonstrations",
    "reward": "learns from rankings what is preferred",
    "dpo": "the policy learns what is preferred",
    "ppo": "the policy learns from the reward",
    "sample": "writes answers",
    "rank": "puts answers in order",
    "evaluate": "compares before and after",
}
"""What each kind of stage does, in a few words."""

_LEVELS: Mapping[Level, tuple[str, str]] = {"stop": ("✕", "stop"), "warn": ("!", "look"), "ok": ("✓", "healthy")}
"""Sign and word for each level, the worst first."""


def write_report(run_folder: Path, *, language: Language = "en") -> Path:
    """Writes report.html into a pipeline's run folder, or into the folder of a single stage, and returns its path.

    What is absent is left out. DataError if there is nothing to report, or a file is damaged.
    """
    stages = read_stages(run_folder)
    if not stages:
        raise DataError(f"{run_folder}: no run here; give a run's folder, or a stage's folder with its metrics.jsonl")
    plan = read_json(run_folder / "pipeline.json")
    summary: dict[str, Any] = {}
    for found in (*(stage.evaluation for stage in stages), read_json(run_folder / "summary.json")):
        summary |= found
    examples = summary.get("examples")
    simulated = any(map(says_simulated, (plan, summary, *(stage.manifest for stage in stages))))

    def say(english: str) -> str:
        return CHINESE.get(english, english) if language == "zh" else english

    title = run_folder.resolve().name
    body = join(
        _header(title, plan, stages, say),
        _banner(say) if simulated else Html(),
        _what_was_done(stages, say),
        _result(summary, stages, say),
        curves_section(stages, say),
        _gates(stages, say),
        _health(stages, say),
        _examples(examples, say) if examples else _samples(stages, say),
        _glossary(stages, say),
        _footer(stages, say),
    )
    path = run_folder / "report.html"
    write_whole(path, page(f"{title} · {say('Training report')}", body, language))
    return path


def _header(title: str, plan: Mapping[str, Any], stages: Sequence[Stage], say: Say) -> Html:
    described = plan.get("description") or (stages[0].settings.get("description") if len(stages) == 1 else "")
    lead = el("p.lead", str(described), dir="auto") if described else Html()
    return join(el("p.eyebrow", say("Training report")), el("h1", title, dir="auto"), lead)


def _banner(say: Say) -> Html:
    more = "No person was asked. This shows that the machinery learns what it is taught, not that the answers are good."
    return el("p.banner", el("b", say("Rankings by a SIMULATED annotator.")), " ", say(more), role="note")


def _what_was_done(stages: Sequence[Stage], say: Say) -> Html:
    """A box for each stage; the bar at its foot is its share of the longest one's time."""
    longest = max(stage.seconds or 0.0 for stage in stages)
    boxes = []
    for stage in stages:
        status = str(stage.manifest.get("status", ""))
        style = {"done": "ok", "running": ""}.get(status, "warn")
        width = 100 * (stage.seconds or 0.0) / longest if longest else 0.0
        boxes.append(
            el(
                "li.card",
                el("h4", stage.name),
                el("p.what", say(WHAT.get(stage.kind, stage.kind))),
                el(
                    "div.foot",
                    el("span", "" if stage.seconds is None else clock(stage.seconds)),
                    el(f"span.chip.{style}", say(status)) if status else Html(),
                ),
                el("span.time", style=f"width:{width:.1f}%"),
            )
        )
    return join(el("h2", say("What was done")), el("ol.stages", *boxes), _lineage(stages, say))


def _lineage(stages: Sequence[Stage], say: Say) -> Html:
    """Which files went into and came out of each stage, by their hashes, and the settings in full."""
    known = [stage for stage in stages if stage.manifest]
    if not known:
        return Html()
    rows = [
        el(
            "tr",
            el("td", stage.name),
            el("td", _hashes(stage.manifest.get("inputs"))),
            el("td", _hashes(stage.manifest.get("outputs"))),
            el("td", str(stage.manifest.get("seed", ""))),
        )
        for stage in known
    ]
    settings = [
        el(
            "details",
            el("summary", f"{stage.name}: {say('settings')}"),
            el("pre", json.dumps(stage.settings, indent=2, ensure_ascii=False)),
        )
        for stage in known
        if stage.settings
    ]
    heads = [el("th", say(head)) for head in ("stage", "inputs", "outputs", "seed")]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows))
    title = el("summary", say("Lineage: what went in, what came out, with which settings"))
    return el("details", title, el("div.card.wide", table), *settings)


def _hashes(files: Any) -> Html:
    if not isinstance(files, Mapping):
        return Html()
    return join(
        *(
            el("div", str(name), " ", el("code.dim", str(digest)[:10], title=str(digest)))
            for name, digest in files.items()
        )
    )


def _result(summary: Mapping[str, Any], stages: Sequence[Stage], say: Say) -> Html:
    def one(name: str, value: float | None, show: Callable[[float], str], unit: str, note: str) -> Html:
        return Html() if value is None else _tile(say(name), join(show(value), el("small", f" {unit}")), say(note))

    def change(name: str, stem: str, show: Callable[[float], str], note: str) -> Html:
        before, after = number(summary, f"{stem}_sft"), number(summary, f"{stem}_ppo")
        if before is None or after is None:
            return one(name, before if after is None else after, show, "", note)
        return _tile(say(name), join(el("small", f"{show(before)} → "), show(after)), say(note))

    memory = [number(found, "peak_rss_gb") for found in (summary, *(stage.manifest for stage in stages))]
    peak = max((gigabytes for gigabytes in memory if gigabytes is not None), default=None)
    distance = "KL to the starting model, per answer"
    tiles = (
        _win_rate(summary, say),
        change("Gold preference", "gold", _signed, "what the simulated annotator likes, before → after"),
        _reward_model(summary, stages, say),
        one("Distance travelled", number(summary, "kl_per_answer"), _plain, "nats", distance),
        change("Length", "length", _plain, "tokens an answer, before → after"),
        change("Finished", "finished", _percent, "answers that end by themselves"),
        change("Variety", "distinct", _percent, "distinct pairs of words"),
        one("Time", _total_seconds(summary, stages), clock, "", "all stages together"),
        one("Memory", peak, _plain, "GB", "at its peak, in RAM"),
    )
    return join(el("h2", say("The result")), el("div.tiles", *tiles)) if any(tiles) else Html()


def _tile(name: str, big: Html, note: str) -> Html:
    return el("div.card.tile", el("p.name", name), el("div.big", big), el("p.note", note))


def _reward_model(summary: Mapping[str, Any], stages: Sequence[Stage], say: Say) -> Html:
    """How many pairs it orders rightly, how sure that is, and what a judge that sees only length would reach."""
    told = summary.get("reward_accuracy")
    found: Mapping[str, Any] = next((stage.accuracy for stage in stages if stage.accuracy), {})
    if isinstance(told, Mapping):
        found = told
    elif (accuracy := number(summary, "reward_accuracy")) is not None and accuracy != found.get("accuracy"):
        bounds = {bound: summary.get(f"reward_accuracy_{bound}") for bound in ("low", "high")}
        found = {"accuracy": accuracy, **bounds}  # Measured on other rankings than the stage's own.
    accuracy, low, high, length = (number(found, key) for key in ("accuracy", "low", "high", "length_baseline"))
    if accuracy is None:
        return Html()
    notes = [say("of held-out pairs ordered rightly")]
    notes += [f"({100 * low:.0f}\u2013{_percent(high)})"] if low is not None and high is not None else []
    notes += [f"· {say('length alone')}: {_percent(length)}"] if length is not None else []
    return _tile(say("Reward model"), Html(_percent(accuracy)), " ".join(notes))


def _win_rate(summary: Mapping[str, Any], say: Say) -> Html:
    """The share as a bar from 0 to 100 %, its interval as a whisker, and a dashed line where nobody wins."""
    rate, low, high = (number(summary, key) for key in ("win_rate", "win_rate_low", "win_rate_high"))
    if rate is None:
        return Html()
    chip, whisker, interval = Html(), Html(), ""
    if low is not None and high is not None:
        style, verdict = "", "no clear difference"
        if low > 0.5:
            style, verdict = "ok", "clearly better than before"
        elif high < 0.5:
            style, verdict = "stop", "clearly worse than before"
        chip = el(f"span.chip.{style}", say(verdict))
        whisker = el("i.whisker", style=f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%")
        interval = f"{say('95 % interval')}: {100 * low:.0f}\u2013{100 * high:.0f}\u00a0%"
    sentence = "On {} of the prompts the trained model's answer is preferred to the one before; a tie counts half."
    scale = el(
        "div.scale",
        el("i.track"),
        el("i.fill", style=f"width:{100 * rate:.2f}%"),
        el("i.half"),
        whisker,
        el("span", "0 %"),
        el("span.centre", f"50 %: {say('no difference')}"),
        el("span.right", "100 %"),
    )
    judge = {
        "gold": "Judged by the simulated annotator's hidden preference.",
        "reward": "Judged by the reward model.",
        "model": "Judged by a model that was asked about every pair in both orders.",
    }
    judged = say(judge.get(str(summary.get("judge")), ""))
    if (place := number(summary, "judge_same_place")) is not None:
        told = "In {} of the pairs the same place won both times; they count as ties."
        judged += " " + say(told).format(_percent(place))
    said = el("p.note", f"{say(sentence).format(_percent(rate))} {judged} ", el("b", interval))
    head = el("div", el("p.name", say("Win rate")), el("div.big", _percent(rate)), chip)
    return el("div.card.tile.hero", head, el("div", said, scale))


def _total_seconds(summary: Mapping[str, Any], stages: Sequence[Stage]) -> float | None:
    told = summary.get("seconds")
    total = number(told, "total") if isinstance(told, Mapping) else None
    spent = [stage.seconds for stage in stages if stage.seconds is not None]
    return total if total is not None else sum(spent) if spent else None


def _examples(examples: Any, say: Say) -> Html:
    """Both models' answers side by side."""
    cards = [_example(one, say) for one in examples if isinstance(one, Mapping)]
    shown, hidden = cards[:EXAMPLES_SHOWN], cards[EXAMPLES_SHOWN:]
    more = el("details", el("summary", f"{len(hidden)} {say('more')}"), *hidden) if hidden else Html()
    return join(el("h2", say("Answers before and after")), *shown, more)


def _example(one: Mapping[str, Any], say: Say) -> Html:
    judge = "gold" if number(one, "gold_after") is not None else "reward"
    before, after = number(one, f"{judge}_before"), number(one, f"{judge}_after")
    if (sign := number(one, "verdict")) is not None:
        before, after = 0.0, sign
    verdict = Html()
    if before is not None and after is not None and before != after:
        style, word = ("ok", f"▲ {say('better')}") if after > before else ("stop", f"▼ {say('worse')}")
        verdict = el(f"span.chip.{style}", word)
    sides = []
    for side in ("before", "after"):
        scores = [(name, number(one, f"{name}_{side}")) for name in ("gold", "reward")]
        chips = [el("span.chip", f"{say(name)} {_signed(score)}") for name, score in scores if score is not None]
        head = el("div.head", el("b", say(side)), verdict if side == "after" else Html(), *chips)
        sides.append(el("div", head, el("div.answer", _text(one.get(side)), dir="auto")))
    return _answers(one.get("prompt"), sides)


def _samples(stages: Sequence[Stage], say: Say) -> Html:
    """Where no comparison was made: the first and the last answers of the stage that learnt last."""
    samples = next((stage.samples for stage in reversed(stages) if stage.samples), [])
    chosen = samples if len(samples) <= 6 else [*samples[:2], *samples[-4:]]
    cards = []
    for one in chosen:
        reward = number(one, "reward")
        chips = [el("span.chip", f"{say('step')} {one.get('step', '')}")]
        chips += [el("span.chip", f"{say('reward')} {_signed(reward)}")] if reward is not None else []
        chips += [el("span.chip.warn", say("cut at the length limit"))] if one.get("finish") == "length" else []
        answer = el("div", el("div.head", *chips), el("div.answer", _text(one.get("answer")), dir="auto"))
        cards.append(_answers(one.get("prompt"), [answer]))
    return join(el("h2", say("Answers while training")), *cards) if cards else Html()


def _answers(prompt: Any, sides: Sequence[Html]) -> Html:
    return el("article.card.example", el("div.prompt", _text(prompt), dir="auto"), el("div.pair", *sides))


def _text(found: Any) -> str:
    """A text, or the turns of a conversation, one a line."""
    if isinstance(found, list):
        return "\n".join(str(turn.get("content", "")) if isinstance(turn, Mapping) else str(turn) for turn in found)
    return "" if found is None else str(found)


def _health(stages: Sequence[Stage], say: Say) -> Html:
    """Every verdict, the worst first, with the setting to turn where it is not well."""
    found = [(stage, verdict) for stage in stages for verdict in verdicts(stage.kind, stage.rows, stage.settings)]
    if not found:
        return Html()
    found.sort(key=lambda pair: list(_LEVELS).index(pair[1].level))
    counts = {level: sum(verdict.level == level for _, verdict in found) for level in _LEVELS}
    chips = [join(_level_chip(level, say, f": {count}"), " ") for level, count in counts.items() if count]
    heads = [el("th", say(head)) for head in ("verdict", "stage", "metric", "value", "why")]
    rows = [_verdict(stage, verdict, say) for stage, verdict in found]
    table = el("table.verdicts", el("thead", el("tr", *heads)), el("tbody", *rows))
    return join(el("h2", say("Health")), el("p", *chips), el("div.card.wide", table))


def _verdict(stage: Stage, verdict: Verdict, say: Say) -> Html:
    row = metric(verdict.metric)
    remedy = Html() if verdict.level == "ok" else el("div.remedy", f"{say('what to turn')}: {verdict.setting}")
    return el(
        "tr",
        el("td", _level_chip(verdict.level, say)),
        el("td", stage.name),
        el("td", el("code", verdict.metric, title=row.meaning)),
        el("td.number", row.show(verdict.value)),
        el("td.reason", verdict.reason, remedy),
    )


def _level_chip(level: Level, say: Say, more: str = "") -> Html:
    sign, word = _LEVELS[level]
    return el(f"span.chip.{level}", f"{sign} {say(word)}{more}")


def _gates(stages: Sequence[Stage], say: Say) -> Html:
    """What each stage's gate said of it, the worst first."""
    levels: Mapping[str, Level] = {"fail": "stop", "warn": "warn", "ok": "ok"}
    found = [(stage.name, one) for stage in stages for one in stage.gate.get("rulings", ())]
    if not found:
        return Html()
    found.sort(key=lambda pair: list(levels).index(pair[1]["verdict"]))
    heads = [el("th", say(head)) for head in ("verdict", "stage", "what was looked at", "evidence")]
    rows = []
    for name, one in found:
        level = levels[one["verdict"]]
        remedy = Html() if level == "ok" else el("div.remedy", f"{say('what to turn')}: {one['remedy']}")
        cells = (el("td", _level_chip(level, say)), el("td", name), el("td", one["what"]))
        rows.append(el("tr", *cells, el("td.reason", one["evidence"], remedy)))
    table = el("table.verdicts", el("thead", el("tr", *heads)), el("tbody", *rows))
    return join(el("h2", say("Gates between the stages")), el("div.card.wide", table))


def _glossary(stages: Sequence[Stage], say: Say) -> Html:
    entries: list[Html] = []
    for name in logged(stages):
        if (row := metric(name)).meaning:
            healthy = el("span.dim", f" {say('Healthy')}: {row.healthy}.") if row.healthy else Html()
            entries += [el("dt", el("code", name), el("span.dim", f" {row.unit}")), el("dd", row.meaning, healthy)]
    return join(el("h2", say("What the numbers mean")), el("div.card", el("dl", *entries))) if entries else Html()


def _footer(stages: Sequence[Stage], say: Say) -> Html:
    versions: Mapping[str, str] = next((found for stage in stages if (found := stage.manifest.get("versions"))), {})
    listed = " · ".join(f"{name} {version}" for name, version in versions.items())
    written = say("Written by dressage; opens without a network and runs no script.")
    return el("footer", el("p", written), el("p", listed))


def _percent(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"


def _plain(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}".replace("-", "\u2212")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212")
