"""Checkpoints: whole or absent, hashed, numbered; a damaged one is named and the one before it is used."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dressage.errors import CheckpointError
from dressage.models.files import load_tensors, new_folder, remove, save_tensors

MANIFEST = "manifest.json"
FILES = {"weights.safetensors", "moments.safetensors", "state.json"}
NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """Plain values: controllers, seconds so far, the hash of the settings."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes checkpoints/step-N under `folder`, then forgets all but the newest `keep` up to it.

    One of a later step is forgotten too: it is damaged, or the run would have gone on from there.

    CheckpointError if it could not be written; the ones before it stay.
    """
    target = folder / "checkpoints" / f"step-{checkpoint.step:06d}"
    with new_folder(target) as partial:
        save_tensors(checkpoint.weights, partial / "weights.safetensors")
        save_tensors(checkpoint.moments, partial / "moments.safetensors")
        _write(partial / "state.json", {"step": checkpoint.step, **checkpoint.state})
        _write(partial / MANIFEST, {path.name: _sha256(path) for path in sorted(partial.iterdir())})
    for path in _numbered(folder):
        if _step(path) > checkpoint.step:
            remove(path)
    forget(folder, checkpoint.step, keep)
    return target


def forget(folder: Path, step: int, keep: int) -> None:
    """Forgets all checkpoints but the newest `keep` up to `step`, and what was left when a save was cut short."""
    old = [path for path in _numbered(folder) if _step(path) <= step][:-keep]
    for path in (*old, *(folder / "checkpoints").glob(".step-*")):
        remove(path)


def load_checkpoint(folder: Path, step: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint under `folder`, or that of a step; None if there is none at all.

    Damaged ones are named in a warning and passed over; CheckpointError if every one is damaged.
    """
    numbered = [path for path in _numbered(folder) if step in (None, _step(path))]
    for path in reversed(numbered):
        fault = _fault(path)
        if fault is None:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            weights, moments = (load_tensors(path / f"{name}.safetensors") for name in ("weights", "moments"))
            return Checkpoint(state.pop("step"), weights, moments, state)
        warnings.warn(f"{path}: {fault}; the checkpoint before it is used", stacklevel=2)
    if numbered:
        raise CheckpointError(f"{folder / 'checkpoints'}: every checkpoint is damaged; delete the folder to start anew")
    return None


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints under `folder`, in order."""
    return [_step(path) for path in _numbered(folder) if _fault(path) is None]


def _numbered(folder: Path) -> list[Path]:
    return sorted((path for path in (folder / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "has no readable manifest"
    if not isinstance(manifest, dict) or manifest.keys() != FILES:
        return f"{MANIFEST} does not list the files of a checkpoint"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != digest:
            return f"{name} is damaged (its hash is not the one recorded)"
    step = json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]
    return None if step == _step(path) else f"is the checkpoint of step {step} under another name"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
