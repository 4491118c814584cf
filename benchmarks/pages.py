"""What speed.py and peers.py have measured, as tables, a page and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from measuring import Kept, Run, Spread, ratio

from dressage.monitor.charts import HEIGHT, WIDTH, Line, Point, line_chart
from dressage.monitor.metrics import Metric
from dressage.monitor.page import STYLE

RATE = Metric("rate", "tokens/s", "Sampled tokens a second.", decimals=0)
SECONDS, GIGABYTES = Metric("time", "s", "Of a training pass."), Metric("memory", "GB", "Peak RSS.")
GAP, LEGEND, BAR = 30, 34, 22


def table(kept: Kept) -> str:
    """Medians with between what they lay; ratios are of medians, and between what lie those of runs made in turn."""
    lines = [
        "| work | who | seconds a step | rows/s | answer tokens | peak RSS, GB | times our s | times our GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for work in kept.works:
        if work == "sampling" or work.startswith("growth"):
            continue
        for name in kept.subjects(work):
            runs, own = kept.of(work, name), kept.of(work, counterpart(kept, work, name))
            seconds, memory = seconds_of(runs), memory_of(runs)
            answers = [run["result"]["answer_tokens"] for run in runs if "answer_tokens" in run["result"]]
            theirs = not name.startswith("ours") and own
            cells = [
                work,
                name,
                Spread.of(seconds).show(),
                f"{runs[0]['result']['rows'] / Spread.of(seconds).median:.2f}",
                Spread.of(answers).show(1) if answers else "",
                Spread.of(memory).show(),
                f"**{ratio(seconds_of(own), seconds).show(1)}**" if theirs else "",
                f"**{ratio(memory_of(own), memory).show(1)}**" if theirs else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*(lines if len(lines) > 2 else ()), *([""] if len(lines) > 2 else ()), *sampling_table(kept)])


def sampling_table(kept: Kept) -> Iterator[str]:
    rates = sampling_rates(kept)
    if not rates:
        return
    batches = sorted({batch for by_batch in rates.values() for batch in by_batch})
    yield "| tokens/s at batch | " + " | ".join(map(str, batches)) + " |"
    yield "|---|" + "---|" * len(batches)
    for name, by_batch in rates.items():
        cells = (Spread.of(by_batch[batch]).show(0) if batch in by_batch else "" for batch in batches)
        yield f"| {name} | " + " | ".join(cells) + " |"
    for name in rates:
        if name.startswith("ours"):
            continue
        own = rates["ours"]
        cells = (
            f"**{ratio(rates[name][b], own[b]).show(2)}**" if b in rates[name] and b in own else "" for b in batches
        )
        yield f"| ours over {name} | " + " | ".join(cells) + " |"


def sampling_rates(kept: Kept) -> dict[str, dict[int, list[float]]]:
    """By who and batch, a rate for each repeat."""
    found: dict[str, dict[int, list[float]]] = {}
    for subject in kept.subjects("sampling"):
        for run in kept.of("sampling", subject):
            for who, rates in run["result"]["tokens_per_second"].items():
                name = who if subject == "ours" else subject
                for batch, rate in rates.items():
                    found.setdefault(name, {}).setdefault(int(batch), []).append(rate)
    return found


def growth_table(kept: Kept) -> str:
    lines = []
    for work in kept.works:
        if not work.startswith("growth"):
            continue
        what = work.removeprefix("growth: ")
        if what == "group":
            lines += ["", "| answers to a prompt, of 32 | tokens/s |", "|---|---|"]
            for name in kept.subjects(work):
                rates = [run["result"]["tokens_per_second"]["ours"]["32"] for run in kept.of(work, name)]
                lines.append(f"| {name} | {Spread.of(rates).show(0)} |")
            continue
        lines += ["", f"| {what} | tokens | seconds | microseconds a token | GFLOP/s | of the peak | peak RSS, GB |"]
        lines.append("|---" * 7 + "|")
        for name in kept.subjects(work):
            runs = kept.of(work, name)
            tokens, seconds = runs[0]["result"]["tokens"], Spread.of(seconds_of(runs))
            reached = flops_of(runs[0]) / seconds.median
            share = reached / Spread.of([run["result"]["peak_flops_per_second"] for run in runs]).median
            cells = [name, tokens, seconds.show(), f"{1e6 * seconds.median / tokens:.0f}", f"{reached / 1e9:.0f}"]
            cells += [f"{share:.0%}", Spread.of(memory_of(runs)).show()]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines).strip()


def training_flops(weights: int, tokens: int, answer_tokens: int, width: int, vocabulary: int) -> float:
    """Products of one pass with a frozen base: 2 an inner weight and token forward, as many backward.

    The head's are for answer tokens alone. Left out, as small here or avoidable: attention's own products, the
    adapters', and whatever is computed twice.
    """
    return 2 * 2 * (weights * tokens + width * vocabulary * answer_tokens)


def flops_of(run: Run) -> float:
    names = ("inner_weights", "tokens", "answer_tokens", "width", "vocabulary")
    return training_flops(*(run["result"][name] for name in names))


def counterpart(kept: Kept, work: str, name: str) -> str:
    """Whose numbers a peer's are set against: ours with the same weights learning, else ours with LoRA."""
    same = "ours, all weights" if "all weights" in name else "ours, LoRA"
    return same if same in kept.subjects(work) else "ours, LoRA"


def seconds_of(runs: Sequence[Run]) -> list[float]:
    return [run["result"]["seconds"] for run in runs]


def memory_of(runs: Sequence[Run]) -> list[float]:
    return [run["peak_rss_gb"] for run in runs]


def page(kept: Kept, growth: Kept | None, picture_file: str) -> str:
    """docs/speed.md."""
    padding = {
        work: Spread.of([run["result"]["padding_share"] for run in kept.of(work, "ours, LoRA")]).median
        for work in kept.works
        if work != "sampling" and kept.of(work, "ours, LoRA")
    }
    many = [len(kept.of(work, name)) for work in kept.works for name in kept.subjects(work)]
    times = dict.fromkeys((str(min(many)), str(max(many))))
    parts = [
        "# Speed and memory, beside others",
        "Written by `python benchmarks/peers.py --markdown docs/speed.md`; nothing here is typed by hand.",
        whose(kept),
        "Every measurement is a process of its own; ours and the peers' ran in turn. Seconds are medians of the "
        "repeats, with the least and the most; a ratio is that of the medians, and in brackets lie the ratios of the "
        f"runs that followed each other. Runs of each: {' to '.join(times)}. What each work is, stands at the head of "
        "`benchmarks/speed.py`. Rows are "
        "prompts, answers or pairs. DPO's seconds hold the reference's share, which reads each pair once.",
        table(kept),
        f"![How many times our seconds and memory the peers take, and sampling by batch]({picture_file})",
        "Positions that the learner computes beyond the batch's tokens, as a share of what it computes: "
        + ", ".join(f"{work} {share:.0%}" for work, share in padding.items())
        + ". Below zero it computes fewer: what several texts begin with is read once (the system turn of "
        "the chat template too), padding never.",
        *notes(kept),
    ]
    if growth is not None:
        parts += [
            "## Growth",
            "A LoRA training pass over random tokens of like length; FLOPs are 4 an inner weight and token, and the "
            "head's on answer tokens; the peak is that of 2048 x 2048 matrix products in the same process.",
            whose(growth),
            growth_table(growth),
        ]
    parts += ["## Again", "```sh\nmake bench-peers ARGS='--trl-ppo PYTHON --trl PYTHON --vllm PYTHON'\n```"]
    return "\n\n".join(parts) + "\n"


def notes(kept: Kept) -> Iterator[str]:
    """Where the work is not quite the same."""
    if "float32" in {run["result"]["compute"] for run in kept.runs if run["subject"].startswith("ours")}:
        yield (
            "This machine has no fast bfloat16, so all compute in float32, where most of the time is products of "
            "matrices that everybody takes from the same library, but for ours while sampling up to 128 answers at "
            "once. What else is quicker here is work that is not done; what bfloat16 adds, and a GPU, is not measured."
        )
    if "ppo" in kept.works:
        yield (
            "PPO: our answers go on to 64 tokens here, as TRL computes so many for each; TRL's value and reward models "
            "are whole models whose values learn with all weights, ours are adapters on the one base."
        )
    if "grpo" in kept.works:
        yield "GRPO: answers end where the model ends them, with both; the table says how long they were."


def whose(kept: Kept) -> str:
    """Machine, versions and commit, as the measurements hold them."""
    versions: dict[str, set[str]] = {}
    for run in kept.runs:
        for name, version in run["result"].get("versions", {}).items():
            if name not in ("machine", "system"):
                versions.setdefault(name, set()).add(version)
    computes = sorted({run["result"]["compute"] for run in kept.runs if run["subject"].startswith("ours")})
    commits = sorted({run["commit"] for run in kept.runs if run.get("commit")})
    seen = kept.machine
    told = [
        f"Machine: {seen.get('processor')}, {seen.get('cores')} cores"
        f" ({', '.join(seen.get('instructions', ())) or 'no vector instructions known'}), {seen.get('memory_gb')} GB;"
        f" threads: {seen.get('threads')}.",
        f"Ours at {', '.join(commits)}" + (f", computing in {', '.join(computes)}." if computes else "."),
        "Versions: "
        + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
        + ".",
        f"Load before a measurement: {Spread.of([run['load_before'] for run in kept.runs]).show(1)}.",
    ]
    return " ".join(told)


# --- the picture


def picture(kept: Kept, growth: Kept | None) -> str:
    """Bars of how many times ours the peers take, and curves of sampling and growth: a file that stands by itself."""
    bars, height = ratio_bars(kept)
    parts, top = [bars], height + GAP
    for number, (title, word, lines) in enumerate(charts(kept, growth)):
        x, y = number % 2 * (WIDTH + GAP), top + number // 2 * (HEIGHT + LEGEND + GAP)
        names = "".join(f'<tspan class="tick c{line.colour}" dx="14">{escape(line.label)}</tspan>' for line in lines)
        chart = line_chart(lines, title=title, step_word=word)
        placed = chart.replace("<svg ", f'<svg y="{LEGEND}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        parts.append(f'<g transform="translate({x} {y})"><text y="14"><tspan>{title}</tspan>{names}</text>{placed}</g>')
    rows = (len(list(charts(kept, growth))) + 1) // 2
    width, height = 2 * WIDTH + GAP, top + rows * (HEIGHT + LEGEND + GAP)
    ground = f'<rect x="-20" y="-20" width="{width + 40}" height="{height + 40}" style="fill:var(--card)"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 -20 {width + 40} {height + 40}">'
        f"<style>{STYLE} text{{font:14px system-ui,sans-serif;fill:var(--ink)}}</style>{ground}{''.join(parts)}</svg>\n"
    )


def ratio_bars(kept: Kept) -> tuple[str, int]:
    """Two bars a peer and work, seconds and memory in times ours; and how high it all is."""
    rows = []
    for work in kept.works:
        for name in kept.subjects(work):
            own = kept.of(work, counterpart(kept, work, name))
            if work == "sampling" or name.startswith("ours") or not own:
                continue
            runs = kept.of(work, name)
            times = ratio(seconds_of(own), seconds_of(runs)).median, ratio(memory_of(own), memory_of(runs)).median
            rows.append((f"{work}: {name}", times))
    if not rows:
        return "", 0
    left, width = 300, 2 * WIDTH + GAP - 300 - 60
    most = max(max(times) for _, times in rows)
    parts = [
        '<text y="14"><tspan>Times ours, where both do the same work:</tspan><tspan class="tick c0" dx="14">seconds'
        '</tspan><tspan class="tick c1" dx="14">peak memory</tspan></text>'
    ]
    for number, (label, times) in enumerate(rows):
        y = LEGEND + number * (2 * BAR - 4)
        parts.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end" class="tick">{escape(label)}</text>')
        for colour, value in enumerate(times):
            length, top = width * value / most, y + colour * 15
            parts.append(f'<rect x="{left}" y="{top}" width="{length:.1f}" height="12" style="fill:var(--c{colour})"/>')
            parts.append(f'<text x="{left + length + 6:.1f}" y="{top + 11}" class="tick">{value:.1f}</text>')
    at_one = left + width / most
    bottom = LEGEND + len(rows) * (2 * BAR - 4)
    parts.append(f'<line class="mark" x1="{at_one:.1f}" x2="{at_one:.1f}" y1="{LEGEND - 6}" y2="{bottom}"/>')
    return "".join(parts), bottom


def charts(kept: Kept, growth: Kept | None) -> Iterator[tuple[str, str, list[Line]]]:
    rates = sampling_rates(kept)
    if rates:
        lines = [
            Line(
                name, RATE, [Point(batch, Spread.of(values).median) for batch, values in sorted(found.items())], colour
            )
            for colour, (name, found) in enumerate(list(rates.items())[:4])
        ]
        yield "sampling, by batch", "batch", lines
    if growth is None:
        return
    curves: Mapping[str, str] = {
        "growth: thousand tokens": "thousand tokens",
        "growth: tokens at once": "tokens at once",
    }
    for work, word in curves.items():
        points = [(float(name), growth.of(work, name)) for name in growth.subjects(work)]
        if points:
            seconds = [Point(value, Spread.of(seconds_of(runs)).median) for value, runs in sorted(points, key=first)]
            memory = [Point(value, Spread.of(memory_of(runs)).median) for value, runs in sorted(points, key=first)]
            lines = [Line("seconds", SECONDS, seconds, 0), Line("peak RSS", GIGABYTES, memory, 1, right=True)]
            yield f"a training pass, by {word}", "", lines


def first(pair: tuple[float, Any]) -> float:
    return pair[0]
