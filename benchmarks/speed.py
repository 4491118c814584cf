"""How fast and how small: our own verbs, sampling, and how both grow with the work. peers.py puts others beside it.

    python benchmarks/speed.py [--only ppo sft ...] [--repeats 1] [--threads 1] [--growth] [--out runs/speed]

On the packaged model, in the type that is quick on this machine. Each measurement is a process of its own, whose peak
memory is the system's count; what OUT/results.json holds already is not measured again.

- ppo: 16 prompts of at most 80 tokens, 64 new tokens to each, LoRA, reward model and critic on the shared base.
- grpo: 16 answers of at most 64 tokens in groups of 8, LoRA, rewarded by a function of the text.
- sft, reward, dpo: 8 rows or pairs a step of at most 512 tokens, LoRA and all weights.
- sampling: 48 random tokens, 64 new ones at batch 1 to 128, beside transformers' `generate`.

A verb goes over its rows twice, and the second time counts: everybody has then done the very same work. --growth takes
an hour: a training pass by tokens a step, length of prompt and answer, and size of model; sampling by size of group.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import HERE, Failed, Kept, Subject, process

SFT, PREFERENCE = "sft/alpaca_gpt4_en_demo.shared.json", "preference/hh_harmless_base_test.shared.jsonl.gz"
PROMPTS, NEW, GROUP, ROWS = 16, 64, 8, 8
BATCHES = (1, 8, 16, 32, 64, 128)
WORKS = ("ppo", "grpo", "sft", "reward", "dpo", "sampling")
DATA = {"ppo": "ppo", "grpo": "grpo", "sft": "sft", "reward": "pairs", "dpo": "pairs"}
PPO: Mapping[str, Sequence[str]] = {
    "ours, LoRA": (),
    "ours, LoRA, within 1.6 GB": ("training.memory_gb=1.6",),
    "ours, LoRA, critic on the policy's trunk": ("value.start=zero",),
    "ours, LoRA, critic on the policy's trunk, within 1.6 GB": ("value.start=zero", "training.memory_gb=1.6"),
}
GRPO: Mapping[str, Sequence[str]] = {"ours, LoRA": ()}
WEIGHTS = ("LoRA", "all weights")
OFFLINE: Mapping[str, Sequence[str]] = {"ours, LoRA": (), "ours, all weights": ("lora=null",)}
"""By name, what differs from the settings that a run has without saying."""


def near_a_hundred_characters(answers: Sequence[str], **_: Any) -> list[float]:
    """GRPO's reward."""
    return [-float(abs(len(answer) - 100)) for answer in answers]


def prepare(data: Path, out: Path, steps: int) -> dict[str, Any]:
    """Writes down everybody's work, once; where the model lies, and tokens a row."""
    rows = {"ppo": PROMPTS * steps, "grpo": PROMPTS // GROUP * steps, "sft": ROWS * steps, "pairs": ROWS * steps}
    told, asked = out / "work" / "told.json", {"rows": rows, "out": str(out / "work")}
    asked |= {"sft": str(data / SFT), "preference": str(data / PREFERENCE)}
    if not told.is_file() or json.loads(told.read_text())["asked"] != asked:
        for name in (SFT, PREFERENCE):
            if not (data / name).is_file():
                raise SystemExit(
                    f"{data / name}: is not there; give --data or DRESSAGE_SHARED_DATA, the folder of data"
                )
        run = process(Subject("prepare", "ours", "ours/prepare.py", asked), out / "logs" / "prepare.log", 600)
        told.write_text(json.dumps({"asked": asked, **run["result"]}) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def ours(work: str, out: Path, steps: int, more: Sequence[str] = (), weights: Sequence[str] = WEIGHTS) -> list[Subject]:
    """Our side of a piece of work."""
    if work == "sampling":
        asked = {"batches": BATCHES, "prompt": 48, "new": NEW, "rounds": 2}
        return [Subject(work, "ours", "ours/sampling.py", asked)]
    training = f"training={{steps: {2 * steps}, checkpoint_every: 0, keep_checkpoints: 1, batch_size: {ROWS}}}"
    common = ["model={name: packaged}", "health.on_alarm=warn", "optimizer.learning_rate=1e-5", training]
    rows = json.dumps([str(out / "work" / f"{DATA[work]}.jsonl")])
    if work in ("ppo", "grpo"):
        common.append(f"prompts={{sources: {rows}, heldout_fraction: 0.0, max_tokens: 80, on_too_long: error}}")
    else:
        common.append(f"data={{sources: {rows}, heldout_fraction: 0.0, max_tokens: 512, on_too_long: error}}")
    if work == "ppo":
        rollout = f"rollout={{prompts_per_step: {PROMPTS}, max_new_tokens: {NEW}}}"
        common += [f"reward_model={json.dumps(str(out / 'work' / 'reward'))}", rollout]
        variants, verb = PPO, "ppo"
    elif work == "grpo":
        function = json.dumps(f"{HERE / 'speed.py'}:near_a_hundred_characters")
        rollout = f"{{prompts_per_step: {PROMPTS // GROUP}, answers_per_prompt: {GROUP}, max_new_tokens: {NEW}}}"
        common += ["algorithm=grpo", "kl.coef=0.0", "truncated=keep", "score_clip=null", f"rollout={rollout}"]
        common.append(f"rewards.near={{type: function, function: {function}}}")
        variants, verb = GRPO, "ppo"
    else:
        variants, verb = {name: own for name, own in OFFLINE.items() if name.removeprefix("ours, ") in weights}, work
    return [
        Subject(
            work,
            name,
            "ours/verb.py",
            {
                "verb": verb,
                "settings": [*common, *own, *more],
                "out": str(out / "runs" / f"{work}-{number}"),
                "timed": steps,
                "rows": PROMPTS if verb == "ppo" else ROWS,
                # TRL's PPO computes as many tokens for every answer as the longest has.
                "never_end": work == "ppo",
            },
        )
        for number, (name, own) in enumerate(variants.items())
    ]


def growth(out: Path) -> list[Subject]:
    """A training pass, or sampling, with one thing growing and all else as it was; a name says which, and how far."""
    usual = {"rows": 16, "prompt": 48, "answer": 64, "passes": 3, "micro_batch_tokens": 1024, "model": "packaged"}

    def passes(what: str, value: object, **changed: Any) -> Subject:
        asked = usual | {"models": str(out / "models")} | changed
        return Subject(f"growth: {what}", str(value), "ours/growth.py", asked)

    thousands = (1, 2, 4, 8, 16, 32, 64)
    return [
        *(passes("thousand tokens", k, rows=8 * k, prompt=64, passes=3 if k < 16 else 1) for k in thousands),
        *(passes("prompt tokens", n, prompt=n, rows=8) for n in (16, 64, 256, 512, 960)),
        *(passes("answer tokens", n, answer=n, rows=8) for n in (16, 64, 256, 512, 960)),
        *(passes("tokens at once", n, rows=64, micro_batch_tokens=n) for n in (256, 512, 1024, 2048, 4096)),
        *(passes("model", name, model=name, rows=8, passes=2) for name in ("packaged", "360M", "1B")),
        *(
            Subject(
                "growth: group", str(size), "ours/sampling.py",
                {"batches": [32], "prompt": 256, "new": 32, "rounds": 2, "group": size},
            )
            for size in (1, 2, 4, 8, 16, 32)
        ),
    ]  # fmt: skip


def options(about: str, out: str, *, steps: int, repeats: int) -> argparse.ArgumentParser:
    """What speed.py and peers.py both take."""
    taken = argparse.ArgumentParser(description=about)
    taken.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="leave out other works")
    taken.add_argument(
        "--weights",
        nargs="+",
        choices=WEIGHTS,
        default=list(WEIGHTS),
        help="what learns, where both are measured",
    )
    taken.add_argument("--repeats", type=int, default=repeats)
    taken.add_argument(
        "--steps", type=int, default=steps, help="timed steps of a verb, after as many that do not count"
    )
    taken.add_argument("--threads", type=int, help="of every process; else OMP_NUM_THREADS, else all cores")
    taken.add_argument("--limit", type=float, default=3600, help="seconds after which a measurement is given up")
    taken.add_argument("--data", type=Path, help="folder of real data; else DRESSAGE_SHARED_DATA, else ../shared/data")
    taken.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="for all of our verbs")
    taken.add_argument("--out", type=Path, default=Path(out))
    return taken


def chosen(taken: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    found = taken.parse_args(arguments)
    beside = HERE.parents[1] / "shared" / "data"
    found.data = (found.data or Path(os.environ.get("DRESSAGE_SHARED_DATA", beside))).resolve()
    found.out = found.out.resolve()
    if found.threads:
        os.environ["OMP_NUM_THREADS"] = str(found.threads)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    taken = options(__doc__.splitlines()[0], "runs/speed", steps=2, repeats=1)
    taken.add_argument("--growth", action="store_true", help="how time and memory grow, instead of the works")
    found = chosen(taken, arguments)
    kept = Kept(found.out)
    if found.growth:
        wanted = growth(found.out)
    else:
        if set(found.only) & set(DATA):
            try:
                prepare(found.data, found.out, found.steps)
            except Failed as failure:
                print(f"the work could not be prepared: {failure}")
                return 1
        wanted = [
            subject for work in found.only for subject in ours(work, found.out, found.steps, found.set, found.weights)
        ]
    for repeat in range(1, found.repeats + 1):
        for subject in wanted:
            kept.measure(subject, repeat, found.limit)
    from pages import growth_table, table

    print(growth_table(kept) if found.growth else table(kept))
    return 0 if all(kept.has(subject, found.repeats) for subject in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
