"""A reward model with a bias for brevity: does the watch say so in time, and does the rollback save the better policy?

    python benchmarks/overoptimisation.py [--rounds 16] [--out runs/overoptimisation]

The quickstart, but for its rankings: whoever made them put the shorter answer first and looked at nothing else. PPO
follows that reward model with little price on the KL, twice: once to the end with `health.on_alarm=warn`, and once with
`rollback`. The gold preference, which neither sees, first rises (answers come to an end) and then falls (they say
nothing). Prints a table, writes OUT/results.json and OUT/overoptimisation.svg; exits with 1 if the first warning came
after gold had begun to fall for good, or if the policy that was rolled back to is not the better one. What is done is
skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from methods import dressage, evaluated
from random_walks import standing_alone

from dressage.monitor.charts import HEIGHT, WIDTH, Flag, Line, Point, line_chart
from dressage.monitor.metrics import METRICS
from dressage.monitor.watch import Watch
from dressage.monitor.writers import read_metrics
from dressage.pipeline import write_json
from dressage.stages.answers import lines_of, write_lines

WATCHED = {"reward/score_mean": "score and gold", "reward/length_correlation": "score and length"}
"""The two numbers that tell of this fault, and what each compares."""


def rank_by_length(answers: Path, rankings: Path) -> None:
    """The shorter the better; answers of one length tie."""
    rows = []
    for _, row in lines_of(answers):
        lengths = [answer["tokens"] for answer in row["answers"]]
        rows.append(
            {
                "prompt": row["prompt"],
                "answers": [answer["text"] for answer in row["answers"]],
                "finished": [answer["finish"] == "stop" for answer in row["answers"]],
                "ranks": [sorted(set(lengths)).index(length) for length in lengths],
                "annotator": "the shorter is the better",
            }
        )
    write_lines(rankings, rows)


def common(out: Path) -> None:
    """The quickstart's fine-tuned model and its answers, ranked by length, and a reward model of that."""
    left_out = [f"stages.{name}=null" for name in ("rank", "ppo", "answers_ppo", "evaluate")]
    dressage("run", "quickstart", f"folder={out}", "stages.reward=null", *left_out)
    rankings = out / "biased.jsonl"
    if not rankings.is_file():
        rank_by_length(out / "samples" / "answers.jsonl", rankings)
    dressage("run", "quickstart", f"folder={out}", f"stages.reward.data.sources=[{rankings}]", *left_out)


def train(out: Path, name: str, rounds: int) -> dict[str, Any]:
    """PPO by that reward model into OUT/NAME with `health.on_alarm=NAME`; its answers to the held-out prompts."""
    dressage(
        "rl", "ppo", f"model.name={out / 'sft/policy'}", "model.system=", f"reward_model={out / 'reward/reward'}",
        "prompts={sources: ['material:prompts_train.jsonl'], heldout_fraction: 0.0, max_tokens: 80}",
        "gold=simulated", "lora={rank: 16, alpha: 32, layers: 16}", "value.start=zero", "kl.coef=0.02",
        "rollout={prompts_per_step: 32, max_new_tokens: 40}", "minibatch_size=8",
        "optimizer={learning_rate: 5.0e-4, schedule: linear}",
        f"training={{steps: {rounds}, micro_batch_tokens: 512, checkpoint_every: 1, keep_checkpoints: {rounds}}}",
        f"health={{on_alarm: {name}, patience_steps: 1}}", "--out", str(out / name),
    )  # fmt: skip
    return evaluated(name, out)


def first_told(folder: Path) -> dict[str, dict[str, int]]:
    """By watched number and level, the round after which the watch first said so."""
    settings = json.loads((folder / "stage.json").read_text(encoding="utf-8"))["settings"]
    watch = Watch("ppo", settings | {"health": {"on_alarm": "warn", "patience_steps": 1, "best_by": "gold/mean"}})
    told: dict[str, dict[str, int]] = {}
    for row in read_metrics(folder):
        for verdict in watch.see(row)[0]:
            if verdict.metric in WATCHED:
                told.setdefault(verdict.metric, {}).setdefault(verdict.level, row["step"])
    return told


def picture(folder: Path, flags: list[Flag]) -> str:
    """Score and gold over the rounds of the run that went on, and where the watch spoke."""
    rows = read_metrics(folder)
    lines = [
        Line(label, METRICS[name], [Point(row["step"], row[name]) for row in rows], colour, right)
        for colour, (name, label, right) in enumerate(
            [("reward/score_mean", "score", False), ("gold/mean", "gold preference", True)]
        )
    ]
    names = "".join(f'<tspan class="tick c{line.colour}" dx="14">{line.label}</tspan>' for line in lines)
    chart = line_chart(lines, title="Score and gold", step_word="round", flags=flags)
    placed = chart.replace("<svg ", f'<svg y="24" width="{WIDTH}" height="{HEIGHT}" ', 1)
    return standing_alone([f'<text y="8">{names}</text>', placed], WIDTH, HEIGHT + 24)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=16)
    options.add_argument("--out", type=Path, default=Path("runs/overoptimisation"))
    chosen = options.parse_args()
    out: Path = chosen.out
    common(out)
    judged = {name: train(out, name, chosen.rounds) for name in ("warn", "rollback")}
    told, gold = first_told(out / "warn"), [row["gold/mean"] for row in read_metrics(out / "warn")]
    rolled = read_metrics(out / "rollback")
    # The answers of a round are those of the checkpoint of the round before.
    best = max(range(len(rolled)), key=lambda row: rolled[row]["gold/mean"])
    # Rounds after which gold is never again within a tenth of its best.
    falls = max(step for step, value in enumerate(gold, start=1) if value > max(gold) - 0.1) + 1
    flags = [Flag(step, f"{WATCHED[name]}: {level}") for name, levels in told.items() for level, step in levels.items()]
    flags = [Flag(best + 1, "rolled back to this policy"), *flags]
    (out / "overoptimisation.svg").write_text(picture(out / "warn", flags), encoding="utf-8")
    results = {
        "gold": gold,
        "told": told,
        "falls": falls,
        "rolled_back_to": best,
        "alarm": len(rolled),
        "judged": judged,
    }
    write_json(out / "results.json", results)
    print("| policy | rounds | gold | win rate over SFT | learned score | tokens | KL |\n|---|---|---|---|---|---|---|")
    for name, rounds in {"warn": len(gold), "rollback": best}.items():
        one = judged[name]
        print(
            f"| `{name}` | {rounds} | {one['gold_ppo']:.2f} | {one['win_rate']:.2f} ({one['win_rate_low']:.2f} to"
            f" {one['win_rate_high']:.2f}) | {one['score_ppo']:.2f} | {one['length_ppo']:.0f} |"
            f" {one['kl_per_answer']:.1f} |"
        )
    print(
        f"told: {told}; gold is below its best for good from round {falls}; ended after round {len(rolled)} and rolled"
        f" back to the checkpoint of round {best}"
    )
    in_time = min(step for levels in told.values() for step in levels.values()) < falls
    saved = judged["rollback"]["gold_ppo"] > judged["warn"]["gold_ppo"]
    return 0 if in_time and saved else 1


if __name__ == "__main__":
    sys.exit(main())
