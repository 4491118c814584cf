"""The quickstart on several seeds: does the loop align the model every time, how fast, and in how much memory?

    python benchmarks/quickstart_seeds.py [--seeds 1 2 3] [--out runs/quickstart-seeds]

Each seed is a process of its own. Prints a table and writes OUT/results.json; exits with 1 if a seed misses what the
quickstart promises.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

PROMISES = {
    "win_rate": (0.70, None),
    "win_rate_low": (0.50, None),
    "reward_accuracy": (0.70, None),
    "peak_rss_gb": (None, 2.5),
    "total": (None, 600.0),
}
SHOWN = (
    "win_rate", "win_rate_low", "win_rate_high", "reward_accuracy", "gold_sft", "gold_ppo", "kl_per_answer", 
    "length_sft", "length_ppo", "finished_sft", "finished_ppo", "distinct_sft", "distinct_ppo", "peak_rss_gb", "total",
)  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--out", type=Path, default=Path("runs/quickstart-seeds"))
    chosen = options.parse_args()
    found = {}
    for seed in chosen.seeds:
        folder = chosen.out / f"seed-{seed}"
        command = [sys.executable, "-m", "dressage", "quickstart", "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, check=True)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found[seed] = {name: summary[name] for name in SHOWN if name != "total"} | {
            "total": summary["seconds"]["total"]
        }
    (chosen.out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("| |" + "".join(f" seed {seed} |" for seed in found))
    print("|---|" + "---|" * len(found))
    for name in SHOWN:
        print(f"| {name} |" + "".join(f" {row[name]:.3g} |" for row in found.values()))
    missed = [
        f"seed {seed}: {name} = {row[name]:.3g}"
        for seed, row in found.items()
        for name, (low, high) in PROMISES.items()
        if (low is not None and row[name] < low) or (high is not None and row[name] > high)
    ]
    missed += [
        f"seed {seed}: answers are not as diverse as SFT's within a factor of two"
        for seed, row in found.items()
        if not 0.5 <= row["distinct_ppo"] / row["distinct_sft"] <= 2
    ]
    print("\n".join(missed) or "every promise kept on every seed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
