"""What TRL's trainers are told alike, the seconds of their steps, and the line that ends a measurement."""

from __future__ import annotations

import json
import time
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback


def alike(asked: dict[str, Any]) -> dict[str, Any]:
    """Settings of every trainer: nothing saved, nothing recomputed, the compute type as asked."""
    return {
        "output_dir": asked["out"],
        "max_steps": 2 * asked["timed"],
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "bf16": asked["bf16"],
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.ends.append(time.perf_counter())


def tell(clock: Clock, asked: dict[str, Any], **more: Any) -> None:
    """The mean of the last `timed` steps: a pass over all rows, each once."""
    steps = [after - before for before, after in pairwise(clock.ends)]
    assert len(steps) == 2 * asked["timed"], steps
    timed = steps[-asked["timed"] :]
    told = {
        "seconds": sum(timed) / len(timed),
        "steps": [round(seconds, 3) for seconds in steps],
        "rows": asked["rows"],
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in ("trl", "torch", "transformers", "peft")},
    }
    print("RESULT", json.dumps(told | more), flush=True)
