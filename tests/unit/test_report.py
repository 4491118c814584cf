"""The report of a run: complete, harmless, and right about what it draws."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dressage.errors import DataError
from dressage.monitor.charts import Flag, Line, Point, line_chart
from dressage.monitor.curves import Distance, by_distance
from dressage.monitor.metrics import METRICS
from dressage.monitor.page import Html, el
from dressage.monitor.report import write_report
from dressage.monitor.run_folder import read_stages

ATTACK = '</div><script>alert("x")</script><img src=x onerror=alert(1)> & "quoted" \'single\''


HARMLESS = """html head meta title style body main footer p b i small h1 h2 h4 ol ul li dl dt dd div span code pre
details summary table thead tbody tr th td article figure svg text line path circle rect g"""


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def manifest(name: str, kind: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "stage": name,
        "kind": kind,
        "seed": 1,
        "status": "done",
        "seconds": seconds,
        "peak_rss_gb": 2.31,
        "settings": {"kind": kind, "training": {"steps": 40}},
        "inputs": {f"{name}.jsonl": "4f2a" * 16},
        "outputs": {"policy": "09bc" * 16},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
    } | more


def ppo_rows(steps: int, *, overoptimised: bool = False) -> list[dict[str, Any]]:
    noise = random.Random(7)
    rows = []
    for step in range(1, steps + 1):
        part = step / steps
        score = 1.6 * (1 - math.exp(-2.5 * part)) + noise.gauss(0, 0.09)
        fall = 2.2 * max(0.0, part - 0.45) if overoptimised else 0.0
        rows.append(
            {
                "step": step,
                "seconds": 11.5 * step,
                "reward/score_mean": score,
                "reward/score_std": 0.9 - 0.3 * part + noise.gauss(0, 0.03),
                "reward/total_mean": score - 0.25 * part,
                "gold/mean": -0.35 + 1.1 * (1 - math.exp(-3 * part)) - fall + noise.gauss(0, 0.08),
                "kl/reference_per_answer": 5.2 * part**1.3 + noise.gauss(0, 0.15),
                "kl/coef": 0.05,
                "kl/update_approx": 0.004 + abs(noise.gauss(0, 0.0015)),
                "clip/share": 0.06 + abs(noise.gauss(0, 0.015)),
                "clip/value_share": 0.02 + abs(noise.gauss(0, 0.01)),
                "entropy/per_token": 1.62 - 0.35 * part + noise.gauss(0, 0.03),
                "value/explained_variance": 0.62 - 0.8 * math.exp(-5 * part) + noise.gauss(0, 0.04),
                "loss/policy": -0.012 + noise.gauss(0, 0.006),
                "loss/value": 0.42 * math.exp(-2 * part) + 0.12 + noise.gauss(0, 0.02),
                "loss/ptx": 2.31 + 0.04 * part + noise.gauss(0, 0.03),
                "length/mean_tokens": 44 - 14 * part + noise.gauss(0, 1.2),
                "finished/share": min(1.0, 0.74 + 0.24 * part + noise.gauss(0, 0.02)),
                "distinct/share": min(1.0, 0.91 - 0.05 * part + noise.gauss(0, 0.01)),
                "ratio/first_max_error": 3e-6,
                "engine/max_logprob_difference": 4.1e-5,
                "gradient/norm": 0.8 + abs(noise.gauss(0, 0.2)),
                "learning_rate": 1e-4,
                "time/rollout_seconds": 4.6 - 0.8 * part + noise.gauss(0, 0.2),
                "time/score_seconds": 1.1 + noise.gauss(0, 0.05),
                "time/update_seconds": 5.6 + noise.gauss(0, 0.3),
                "tokens_per_second": 61 + noise.gauss(0, 3),
            }
        )
    return rows


def supervised_rows(steps: int, *, pairs: bool) -> list[dict[str, Any]]:
    noise = random.Random(3)
    rows: list[dict[str, Any]] = [{"step": 0, "seconds": 4.0, "loss/heldout": 0.72 if pairs else 2.9}]
    rows[0] |= {"accuracy/heldout": 0.49} if pairs else {}
    for step in range(1, steps + 1):
        fall = math.exp(-3 * step / steps)
        row = {
            "step": step,
            "seconds": 4 + 1.7 * step,
            "loss/train": (0.42 + 0.29 * fall if pairs else 2.1 + 0.8 * fall) + noise.gauss(0, 0.03),
            "gradient/norm": 1.3 + abs(noise.gauss(0, 0.3)),
            "learning_rate": 2e-4 * (1 - step / steps),
            "tokens_per_second": 170 + noise.gauss(0, 6),
        }
        row |= {"accuracy/train": 0.82 - 0.3 * fall + noise.gauss(0, 0.03)} if pairs else {}
        if step % 10 == 0:
            row |= {"loss/heldout": 0.52 + 0.2 * fall if pairs else 2.25 + 0.65 * fall}
            row |= {"accuracy/heldout": 0.76 - 0.27 * fall} if pairs else {}
        rows.append(row)
    return rows


def examples(count: int) -> list[dict[str, Any]]:
    prompts = [
        "How do I keep basil fresh?",
        "What should I do on a rainy Sunday?",
        "怎样给朋友写一封感谢信？",
        "Explain why the sky is blue, briefly.",
    ]
    before = "There are many ways in which one may do this. The first is to consider the matter from all sides, and "
    after = "Good question! Trim the stems and stand them in a glass of water away from the sun. Hope this helps!"
    return [
        {
            "prompt": prompts[i % 4],
            "before": before * (1 + i % 2),
            "after": after,
            "gold_before": -0.4 + 0.1 * (i % 5),
            "gold_after": 1.1 - 0.35 * (i % 6),
            "reward_before": -0.1,
            "reward_after": 1.3,
        }
        for i in range(count)
    ]


def fake_run(run: Path, *, steps: int = 40, overoptimised: bool = False) -> Path:
    """A run of the whole loop, as a pipeline leaves it."""
    spent = {"sft": 98.2, "answer": 61.0, "rank": 0.4, "reward": 121.5, "ppo": 312.0, "answer-before": 24.1}
    spent |= {"answer-after": 22.7, "evaluate": 9.3}
    kinds = {"answer": "sample", "answer-before": "sample", "answer-after": "sample"}
    about = "SFT, rankings, reward model, PPO, win rate."
    write(run / "pipeline.json", {"description": about, "stages": dict.fromkeys(spent)})
    for name, seconds in spent.items():
        kind = kinds.get(name, name)
        write(run / name / "stage.json", manifest(name, kind, seconds, simulated=kind == "rank"))
    write_rows(run / "sft" / "metrics.jsonl", supervised_rows(60, pairs=False))
    write_rows(run / "reward" / "metrics.jsonl", supervised_rows(60, pairs=True))
    write_rows(run / "ppo" / "metrics.jsonl", ppo_rows(steps, overoptimised=overoptimised))
    sample = {"prompt": "Why?", "answer": "Because of this.", "reward": 0.4, "finish": "length"}
    write_rows(run / "ppo" / "samples.jsonl", [{"step": step, **sample} for step in range(1, steps + 1)])
    accuracy = {"accuracy": 0.742, "low": 0.66, "high": 0.81, "length_baseline": 0.58, "longer_is_better": False}
    write(run / "reward" / "accuracy.json", accuracy)
    write(run / "evaluate" / "evaluation.json", {"judge": "gold", "examples": examples(20)})
    write(
        run / "summary.json",
        {
            "seconds": {**spent, "total": sum(spent.values())},
            "peak_rss_gb": 2.31,
            "reward_accuracy": 0.742,
            "gold_sft": -0.31,
            "gold_ppo": 0.68,
            "win_rate": 0.781,
            "win_rate_low": 0.692,
            "win_rate_high": 0.849,
            "kl_per_answer": 5.1,
            "length_sft": 43.8,
            "length_ppo": 30.2,
            "finished_sft": 0.75,
            "finished_ppo": 0.98,
            "distinct_sft": 0.91,
            "distinct_ppo": 0.86,
        },
    )
    return run


class Outline(HTMLParser):
    """What a browser would see: tags, and text outside of styles; raises where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


def outline(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


def test_a_reports_verdicts_go_by_the_runs_own_bounds(tmp_path: Path) -> None:
    """A clipped share of 0.4 is worth a look by the table, and an alarm where the run says 0.3."""
    rows = [{"step": step, "seconds": 1.0, "clip/share": 0.4} for step in (1, 2)]
    write_rows(tmp_path / "metrics.jsonl", rows)
    for health, word in (({}, "look"), ({"bounds": {"clip/share": [0.1, 0.3]}}, "stop")):
        write(tmp_path / "stage.json", manifest("ppo", "ppo", 3.0, health=health))
        page = write_report(tmp_path).read_text(encoding="utf-8")
        (row,) = re.findall(r"<tr[^>]*>(?:(?!</tr>).)*clip/share(?:(?!</tr>).)*</tr>", page, re.DOTALL)[:1]
        assert f"{word}</span>" in row


def test_a_flag_stands_at_its_step() -> None:
    """Steps 0 to 10 lie between x = 46 and 406; late labels stand to the left of their line."""
    line = Line("score", METRICS["reward/score_mean"], [Point(step, 0.1 * step) for step in range(11)], 0)
    chart = str(line_chart([line], title="t", step_word="step", flags=[Flag(5, "alarm"), Flag(10, "<end>")]))
    assert '<line class="mark" x1="226.0" x2="226.0"' in chart
    assert '<text x="230.0" y="194.0" class="tick flag">alarm</text>' in chart
    assert '<text x="402.0" y="181.0" class="tick flag end">&lt;end&gt;</text>' in chart


def test_score_and_gold_by_distance_by_hand() -> None:
    """Budgets of 1/4, 1/2, 1, 2, ... nats; a round without one of the three numbers is left out."""
    rounds = [(-0.1, 1.0, 0.0), (0.2, 2.0, 1.0), (0.9, 3.0, 4.0), (1.0, 5.0, 2.0), (1.1, 6.0, 1.0), (3.0, 7.0, None)]
    names = ("kl/reference_per_answer", "reward/score_mean", "gold/mean")
    found = by_distance([dict(zip(names, one, strict=True)) for one in rounds])
    assert found == [Distance(0.25, 2, 1.5, 0.5), Distance(1.0, 2, 4.0, 3.0), Distance(2.0, 1, 6.0, 1.0)]
    assert by_distance([{"kl/reference_per_answer": 1.0, "reward/score_mean": 0.0}]) == []


def test_a_whole_run_is_told_in_order(tmp_path: Path) -> None:
    seen = outline(write_report(fake_run(tmp_path / "first")))
    text = seen.text.replace("\u00a0", " ")
    for word in (
        "first",
        "SIMULATED",
        "78 %",
        "69–85 %",
        "clearly better",
        "−0.31 → +0.68",
        "74 %",
        "5.10 nats",
        "10:49",
    ):
        assert word in text, word
    headings = ["What was done", "The result", "Curves", "Health", "Answers before and after", "What the numbers mean"]
    places = [seen.text.index(heading) for heading in headings]
    assert places == sorted(places)
    what = ("learns from demonstrations", "puts answers in order", "compares before")
    boxes = [seen.text.index(phrase) for phrase in what]
    assert boxes == sorted(boxes)
    for name in ppo_rows(1)[0].keys() - {"step", "seconds"}:
        assert METRICS[name].meaning in seen.text, f"{name} is not explained"
    assert sum(dict(attrs).get("class") == "card example" for _, attrs in seen.tags) == 20


def test_the_page_holds_nothing_that_runs_or_loads(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    write(run / "evaluate" / "evaluation.json", {"examples": [{"prompt": ATTACK, "before": ATTACK, "after": ATTACK}]})
    attacked = manifest(ATTACK, "sft", 3, status=ATTACK, inputs={ATTACK: ATTACK}, settings={"description": ATTACK})
    write(run / "sft" / "stage.json", attacked)
    write_rows(run / "sft" / "metrics.jsonl", [{"step": 1, ATTACK: 1.0, "loss/train": 2.0}])
    write(run / "pipeline.json", {"description": ATTACK, "stages": [ATTACK]})
    seen = outline(write_report(run))
    assert {tag for tag, _ in seen.tags} <= set(HARMLESS.split())
    attributes = {key for _, attrs in seen.tags for key in attrs}
    assert not [key for key in attributes if key.startswith("on") or "href" in key or "src" in key or key == "action"]
    assert seen.text.count(ATTACK) >= 8
    policy = [attrs["content"] for tag, attrs in seen.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in str(policy[0])


def test_whatever_is_missing_is_left_out(tmp_path: Path) -> None:
    """Each file of a run taken away in turn, and all but one."""
    whole = fake_run(tmp_path / "0", steps=3)
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*.json*"))]
    for number, name in enumerate(names, start=1):
        run = fake_run(tmp_path / str(number), steps=3)
        (run / name).unlink()
        assert "Training report" in outline(write_report(run)).text
    alone = tmp_path / "alone"
    write(alone / "evaluate" / "evaluation.json", {"win_rate": 0.5, "examples": []})
    seen = outline(write_report(alone))
    assert "50\u00a0%" in seen.text
    assert not [word for word in ("Curves", "Health", "SIMULATED", "Lineage") if word in seen.text]


def test_the_reward_models_accuracy_is_told_wherever_it_stands(tmp_path: Path) -> None:
    """In the reward stage's own file, as a whole in an evaluation alone, or as numbers in the summary."""
    accuracy = {"accuracy": 0.742, "low": 0.66, "high": 0.81, "length_baseline": 0.58}
    write(tmp_path / "reward" / "stage.json", manifest("reward", "reward", 1))
    write(tmp_path / "reward" / "accuracy.json", accuracy)
    write(tmp_path / "evaluate" / "evaluation.json", {"win_rate": 0.6, "reward_accuracy": accuracy})
    for folder in (tmp_path / "reward", tmp_path / "evaluate", tmp_path):
        text = outline(write_report(folder)).text.replace("\u00a0", " ")
        assert "74 %of held-out pairs ordered rightly (66–81 %) · length alone: 58 %" in text
    numbers = {"reward_accuracy": 0.61, "reward_accuracy_low": 0.5, "reward_accuracy_high": 0.7}
    write(tmp_path / "summary.json", numbers)
    text = outline(write_report(tmp_path)).text.replace("\u00a0", " ")
    assert "61 %of held-out pairs ordered rightly (50–70 %)" in text


def test_a_stage_alone_has_its_report(tmp_path: Path) -> None:
    write_rows(tmp_path / "ppo" / "metrics.jsonl", ppo_rows(12))
    sample = {"step": 1, "prompt": "Why?", "answer": "So.", "reward": None, "finish": "stop"}
    write_rows(tmp_path / "ppo" / "samples.jsonl", [sample])
    seen = outline(write_report(tmp_path / "ppo"))
    assert "Score and gold preference" in seen.text and "Answers while training" in seen.text and "So." in seen.text


def test_no_run_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stage's folder"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="no run here"):
        write_report(tmp_path / "absent")
    write(tmp_path / "sft" / "stage.json", {})
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"summary\.json: is damaged"):
        write_report(tmp_path)


def test_runs_moved_aside_are_not_told(tmp_path: Path) -> None:
    write(tmp_path / "sft" / "stage.json", manifest("sft", "sft", 1))
    write(tmp_path / "sft.old-1" / "stage.json", manifest("sft", "sft", 1))
    assert [stage.name for stage in read_stages(tmp_path)] == ["sft"]


def test_numbers_that_are_not_finite_and_lone_surrogates_are_survived(tmp_path: Path) -> None:
    rows = ppo_rows(10)
    rows[4]["reward/score_mean"] = None
    write_rows(tmp_path / "ppo" / "metrics.jsonl", rows)
    sample = {"step": 1, "prompt": "\ud800", "answer": "", "reward": 1, "finish": "stop"}
    write_rows(tmp_path / "ppo" / "samples.jsonl", [sample])
    seen = outline(write_report(tmp_path / "ppo"))
    assert "1 of 10 steps gave no finite number" in seen.text
    assert "score: not a number" in seen.text


def test_chinese_headings(tmp_path: Path) -> None:
    path = write_report(fake_run(tmp_path / "run"), language="zh")
    seen = outline(path)
    assert ("html", {"lang": "zh"}) in seen.tags
    assert all(word in seen.text for word in ("胜率", "健康状况", "训练前", "模拟", "曲线"))


def test_text_is_escaped_unless_it_is_html() -> None:
    assert el("p.a.b", "1 < 2", el("b", "&"), title='"') == '<p class="a b" title="&quot;">1 &lt; 2<b>&amp;</b></p>'
    assert el("p", Html("<br>")) == "<p><br></p>"


def path_points(svg: str) -> list[list[tuple[float, float]]]:
    """Every curve's corners, a list for each."""
    found = re.findall(r'<path class="line c\d" d="([^"]*)"', svg)
    return [[(float(a), float(b)) for a, b in re.findall(r"[ML]([\d.]+) ([\d.]+)", d)] for d in found]


def test_a_chart_is_to_scale() -> None:
    """Corners lie where the tick labels say: the value read off the axis is the value given."""
    values = [2.0, 7.0, 5.5, 10.0]
    points = [Point(10 * k, value) for k, value in enumerate(values)]
    svg = line_chart([Line("loss", METRICS["loss/train"], points, 0)], title="t", step_word="step")
    ticks = [
        (float(y) - 4, float(label)) for y, label in re.findall(r'y="([\d.]+)" class="tick end">(-?[\d.]+)</text>', svg)
    ]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    read = [v0 + (y - y0) * (v1 - v0) / (y1 - y0) for _, y in path_points(svg)[0]]
    assert read == pytest.approx(values, abs=0.01)
    across = [x for x, _ in path_points(svg)[0]]
    assert [b - a for a, b in pairwise(across)] == pytest.approx([across[1] - across[0]] * 3, abs=0.11)
    assert "step 10\nloss: 7.000\u00a0nats" in svg


def test_a_missing_value_is_a_gap_and_a_long_run_is_thinned() -> None:
    gap = [Point(k, None if k == 2 else float(k)) for k in range(5)]
    svg = line_chart([Line("x", METRICS["loss/train"], gap, 0)], title="t", step_word="step")
    assert re.search(r'd="M[^"]*L[^"]*M[^"]*L[^"M]*"', svg)
    long = [Point(k, float(k % 7)) for k in range(3000)]
    svg = line_chart([Line("x", METRICS["loss/train"], long, 0)], title="t", step_word="step")
    assert len(path_points(svg)[0]) == 150 and len(svg) < 100_000


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-9, 2e-9], [-3e5, 8e7], [0.0, 0.0], [1e-4] * 3])
def test_any_range_can_be_drawn(values: list[float]) -> None:
    points = [Point(k, value) for k, value in enumerate(values)]
    for name in ("learning_rate", "finished/share"):
        line = Line("x", METRICS[name], points, 0)
        Outline(line_chart([line, Line("y", METRICS[name], points, 1, right=True)], title="t", step_word="step"))
