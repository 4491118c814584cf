"""What a run left behind, read back: stages in order, each with its manifest, numbers, samples and evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dressage.errors import DataError
from dressage.monitor.metrics import METRICS
from dressage.monitor.writers import read_metrics, read_samples

_STAGE_FILES = ("stage.json", "metrics.jsonl", "evaluation.json")


@dataclass(frozen=True)
class Stage:
    """What a stage's folder holds; absent files are empty."""

    name: str
    kind: str
    manifest: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    accuracy: Mapping[str, Any]
    """Of a reward model on held-out rankings, with its interval and what length alone would reach."""
    gate: Mapping[str, Any]
    """Whether the stage is fit to be rested on, and the rulings that say so."""

    @property
    def seconds(self) -> float | None:
        """As the manifest says; of a stage without one, as its last line says."""
        told = number(self.manifest, "seconds")
        return told if told is not None or not self.rows else number(self.rows[-1], "seconds")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Empty where there is no manifest."""
        settings = self.manifest.get("settings") or {}
        return settings | {"health": self.manifest["health"]} if self.manifest.get("health") else settings


def read_stages(run_folder: Path) -> list[Stage]:
    """The stages of a run in the order in which they ran; the folder itself if it is a single stage's."""
    if any((run_folder / file).is_file() for file in _STAGE_FILES):
        return [_read_stage(run_folder)]
    folders = {
        folder.name: folder
        for folder in (sorted(run_folder.iterdir()) if run_folder.is_dir() else ())
        if ".old-" not in folder.name and any((folder / file).is_file() for file in _STAGE_FILES)
    }
    planned = _names(read_json(run_folder / "pipeline.json").get("stages"))
    timed = _names(read_json(run_folder / "summary.json").get("seconds"))
    return [_read_stage(folders[name]) for name in dict.fromkeys([*planned, *timed, *folders]) if name in folders]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file, DataError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is damaged ({error}); delete it, or run its stage again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: is damaged (no JSON object); delete it, or run its stage again")
    return found


def number(found: Mapping[str, Any], name: str) -> float | None:
    """A finite number of this name, or none."""
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def logged(stages: Iterable[Stage]) -> list[str]:
    """Names of all numbers logged: those of the table in its order, the others after them."""
    names = {name for stage in stages for row in stage.rows for name in row} - {"step", "seconds"}
    return [*(name for name in METRICS if name in names), *sorted(names - METRICS.keys())]


def says_simulated(found: Any) -> bool:
    """Whether "simulated": true stands anywhere in it."""
    if isinstance(found, Mapping):
        return found.get("simulated") is True or any(says_simulated(inner) for inner in found.values())
    return isinstance(found, list) and any(says_simulated(inner) for inner in found)


def _read_stage(folder: Path) -> Stage:
    manifest, rows = read_json(folder / "stage.json"), read_metrics(folder)
    name = str(manifest.get("stage") or folder.resolve().name)
    kind = str(manifest.get("kind") or _kind_of(rows) or name)
    if not isinstance(manifest.get("settings") or {}, Mapping):
        raise DataError(f"{folder / 'stage.json'}: is damaged (settings are no object); run its stage again")
    evaluation, accuracy = read_json(folder / "evaluation.json"), read_json(folder / "accuracy.json")
    gate = read_json(folder / "gate.json")
    return Stage(name, kind, manifest, rows, read_samples(folder), evaluation, accuracy, gate)


def _kind_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """By what only this kind of stage logs."""
    names = {name for row in rows for name in row}
    tells = {
        "kl/reference_per_answer": "ppo",
        "logprobs/chosen": "dpo",
        "accuracy/train": "reward",
        "loss/train": "sft",
    }
    return next((kind for name, kind in tells.items() if name in names), "")


def _names(stages: Any) -> list[str]:
    """Names of stages, from a mapping by name or from a list of names or of mappings with a name."""
    if isinstance(stages, Mapping):
        return [str(name) for name in stages]
    if isinstance(stages, list):
        return [str(one.get("stage", one.get("name"))) if isinstance(one, Mapping) else str(one) for one in stages]
    return []
