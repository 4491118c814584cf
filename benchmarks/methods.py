"""Every method on the packaged model, at an equal budget of samples, judged by the quickstart's gold preference.

    python benchmarks/methods.py [--only ppo grpo ...] [--rounds 6] [--out runs/methods]

The quickstart's stages up to the reward model are run once, with its own settings; then each method learns from 32
answers a round (online rows) or from the rankings that the reward model was trained on (offline rows), and answers the
held-out prompts. What is done is skipped, so that several processes can share the work: first one for the common part,
`--only` with nothing. Prints a table and writes OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from dressage.algorithms.catalog import ALGORITHMS
from dressage.recipe import read_yaml

ANSWERS = 32
"""In a round."""
COMMON = ["stages.ppo=null", "stages.answers_ppo=null", "stages.evaluate=null"]
ONLINE = [name for name, row in ALGORITHMS.items() if "reward" in row.roles]
OFFLINE = [name for name, row in ALGORITHMS.items() if row.implicit_reward is not None and name not in ONLINE]
LORA = "lora={rank: 16, alpha: 32, layers: 16}"
RATE = "optimizer={learning_rate: 5.0e-4, schedule: linear}"


def dressage(*arguments: str) -> float:
    """Runs it; the processor's seconds that it took, which other work on the machine does not lengthen."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "dressage", *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def online(name: str, out: Path, rounds: int) -> float:
    """The row's own recipe, but for what makes the methods comparable: samples, rate, price of KL, size of a step."""
    raw = read_yaml(name)
    each = raw["rollout"].get("answers_per_prompt", 1)
    asked = [
        f"model.name={out / 'sft/policy'}",
        f"reward_model={out / 'reward/reward'}",
        f"rollout.prompts_per_step={ANSWERS // each}",
        f"training.steps={rounds}",
        RATE,
        LORA,
    ]
    if raw["kl"]["coef"]:
        asked.append("kl.coef=0.1")
    if name == "trpo":
        asked.append("minibatch_size=null")  # its step is bounded, and made once
    else:
        asked += ["minibatch_size=8", "value.start=zero"]
    if ALGORITHMS[name].settings.__dict__.get("redraws"):
        asked.append("settings.redraws=0")  # further draws would be further samples
    return dressage("rl", name, *asked, "--out", str(out / name))


def offline(name: str, out: Path) -> float:
    """The row's own recipe, at the same rate, on the rankings of the quickstart, from the fine-tuned model."""
    rankings = json.dumps(str(out / "rank/rankings.jsonl"))
    asked = [f"model.name={out / 'sft/policy'}", f"data.sources=[{rankings}]", RATE, LORA]
    return dressage("dpo", name, *asked, "--out", str(out / name))


def evaluated(name: str, out: Path) -> dict[str, Any]:
    """The answers of OUT/NAME's policy to the held-out prompts against the fine-tuned model's."""
    answers = out / f"{name}-answers"
    asked = ['prompts.sources=["material:prompts_heldout.jsonl"]', "prompts.limit=null", "answers_per_prompt=1"]
    model = f"model.name={out / name / 'policy'}"
    dressage("sample", "sample", model, *asked, "measure_kl=true", "--out", str(answers))
    dressage(
        "evaluate", "evaluate", f"model.name={out / 'sft/policy'}", f"reward_model={out / 'reward/reward'}",
        f"before={out / 'answers_sft/answers.jsonl'}", f"after={answers / 'answers.jsonl'}",
        "--out", str(out / f"{name}-judged"),
    )  # fmt: skip
    found: dict[str, Any] = json.loads((out / f"{name}-judged" / "evaluation.json").read_text(encoding="utf-8"))
    return found


def judged(name: str, out: Path) -> dict[str, Any]:
    """What is shown of a method, and what it cost."""
    found = evaluated(name, out)
    manifest = json.loads((out / name / "stage.json").read_text(encoding="utf-8"))
    kept = (
        "gold_sft", "gold_ppo", "score_sft", "score_ppo", "win_rate", "win_rate_low", "win_rate_high", "kl_per_answer",
        "length_ppo", "finished_ppo", "distinct_ppo",
    )  # fmt: skip
    seconds = float((out / f"{name}-seconds").read_text(encoding="utf-8"))
    return {key: found[key] for key in kept} | {"seconds": seconds, "peak_rss_gb": manifest["peak_rss_gb"]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="*", choices=[*ONLINE, *OFFLINE], default=[*ONLINE, *OFFLINE])
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--out", type=Path, default=Path("runs/methods"))
    chosen = options.parse_args()
    out: Path = chosen.out
    dressage("run", "quickstart", f"folder={out}", *COMMON)
    for name in chosen.only:
        seconds = online(name, out, chosen.rounds) if name in ONLINE else offline(name, out)
        if not (out / f"{name}-seconds").is_file():
            (out / f"{name}-seconds").write_text(f"{seconds:.1f}", encoding="utf-8")
        judged(name, out)
    done = [name for name in (*ONLINE, *OFFLINE) if (out / f"{name}-judged" / "evaluation.json").is_file()]
    results = {name: judged(name, out) for name in done}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("| method | gold | win rate | learned score | KL | tokens | finished | processor seconds | GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in sorted(results.items(), key=lambda item: -item[1]["gold_ppo"]):
        print(
            f"| `{name}` | {row['gold_ppo']:.2f} | {row['win_rate']:.2f} ({row['win_rate_low']:.2f} to"
            f" {row['win_rate_high']:.2f}) | {row['score_ppo']:.2f} | {row['kl_per_answer']:.1f} |"
            f" {row['length_ppo']:.0f} | {row['finished_ppo']:.2f} | {row['seconds']:.0f} | {row['peak_rss_gb']:.1f} |"
        )


if __name__ == "__main__":
    main()
