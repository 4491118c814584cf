"""Does memory stay flat? PPO on the packaged model, small rounds of mixed lengths, for as long as is asked for.

    python benchmarks/memory.py [--minutes 180] [--out runs/memory]

Prompts and answers differ in length from round to round, all stages of a round take part (sampling, scoring, learning,
a checkpoint every tenth round), and what the program has in RAM after each is logged. Prints the slope over the second
half of the rounds, by least squares; the same command goes on where it was stopped, as a longer run. Exits with 1 if
memory grew by more than 3 % of its mean in that half.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from dressage.monitor.writers import read_metrics

FLAT = 0.03
ROUNDS = 100_000
"""More than will be made."""


def train(out: Path, seconds: float) -> None:
    """PPO until the time is over; the run can go on."""
    asked = [
        "prompts={sources: ['material:prompts_train.jsonl'], heldout_fraction: 0.0, max_tokens: 80}",
        "model={name: packaged, system: ''}", "reward_model=null", "gold=simulated", "value.start=zero",
        "rewards.short={type: length, low: 3, high: 20}", "lora={rank: 16, alpha: 32, layers: 16}",
        "rollout={prompts_per_step: 8, max_new_tokens: 40, length_range: [4, 40]}", "minibatch_size=4",
        f"training={{steps: {ROUNDS}, micro_batch_tokens: 512, checkpoint_every: 10}}", "health.on_alarm=warn",
    ]  # fmt: skip
    run = subprocess.Popen([sys.executable, "-m", "dressage", "rl", "ppo", *asked, "--out", str(out)])
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        run.terminate()
        run.wait(120)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=180)
    options.add_argument("--out", type=Path, default=Path("runs/memory"))
    chosen = options.parse_args()
    train(chosen.out, 60 * chosen.minutes)
    rows = [row for row in read_metrics(chosen.out) if row["step"]]
    half = rows[len(rows) // 2 :]
    if len(half) < 3:
        print(f"{len(rows)} rounds: too few to say anything")
        return 1
    memory = [row["memory/rss_gb"] for row in half]
    by_round = statistics.linear_regression([row["step"] for row in half], memory).slope
    by_hour = statistics.linear_regression([row["seconds"] / 3600 for row in half], memory).slope
    grown = by_round * (half[-1]["step"] - half[0]["step"]) / statistics.fmean(memory)
    print(
        f"{len(rows)} rounds in {rows[-1]['seconds'] / 60:.0f} minutes; second half: {min(memory):.3f} to"
        f" {max(memory):.3f} GB, mean {statistics.fmean(memory):.3f}, slope {1000 * by_round:+.3f} MB a round,"
        f" {1000 * by_hour:+.0f} MB an hour: {grown:+.2%} over that half"
    )
    return 0 if grown <= FLAT else 1


if __name__ == "__main__":
    sys.exit(main())
