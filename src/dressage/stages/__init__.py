"""What each verb does: settings and a folder in, products in the folder out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from dressage.config import HealthConfig
from dressage.monitor.watch import require_known
from dressage.settings import Settings
from dressage.stages.answering import rank, sample
from dressage.stages.comparing import evaluate
from dressage.stages.learning import dpo, ppo, reward, sft

WORK: Mapping[str, Callable[[Any, Path, Console | None], None]] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "sample": sample,
    "rank": rank,
    "evaluate": evaluate,
}


def work(config: Settings, folder: Path, console: Console | None) -> None:
    """Does what the settings' kind says, and leaves the memory it took."""
    if isinstance(health := getattr(config, "health", None), HealthConfig):
        require_known(health.bounds)
    try:
        WORK[config.kind](config, folder, console)  # type: ignore[attr-defined]
    finally:
        gc.collect()
