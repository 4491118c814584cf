"""A folder that another run works in, and a disk that is full; what users write wrongly is tried in tests/bad."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
Write = Callable[..., Path]

GOOD = [{"prompt": f"How are you, {name}?", "completion": "Well, thank you."} for name in ("Ann", "Ben", "Cem", "Dao")]


def refused(ran: Any, *words: str) -> None:
    """Exit code 2, and one or two lines that begin with "error:" and hold every one of these words."""
    assert ran.exit_code == 2, ran.output
    lines = ran.stderr.splitlines()
    assert 1 <= len(lines) <= 2 and all(line.startswith("error: ") for line in lines), ran.stderr
    assert "Traceback" not in ran.output
    for word in words:
        assert word in ran.stderr, ran.stderr


@pytest.fixture
def sft(dressage: Command, tiny_model: Path, tmp_path: Path) -> Command:
    """`sft(data, "more=settings")`: learn these demonstrations, in tmp_path/out."""

    def run(data: object, *more: str) -> Any:
        settings = [f"model.name={tiny_model}", f'data.sources=["{data}"]', "training.batch_size=2", *more]
        return dressage("sft", *settings, "--out", tmp_path / "out")

    return run


# --- the folder and its disk ------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(sft: Command, write_rows: Write, tmp_path: Path) -> None:
    from dressage.pipeline import locked

    data = write_rows("data.jsonl", GOOD)
    with locked(tmp_path / "out"):
        refused(sft(data, "training.steps=1"), str(tmp_path / "out"), "another run")
    assert sft(data, "training.steps=1").exit_code == 0


def test_folders_made_for_a_run_that_made_nothing_are_gone(tmp_path: Path) -> None:
    from dressage.pipeline import locked

    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine" / "runs" / "deep" / "sft"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    with locked(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "another").mkdir()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["another", "mine", "runs"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes, which a checkpoint of a large adapter fills more than half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(
    dressage: Command, write_rows: Write, tiny_model: Path, small_disk: Path
) -> None:
    asked = ["sft", f"model.name={tiny_model}", f'data.sources=["{write_rows("data.jsonl", GOOD)}"]', "lora.rank=128"]
    asked += ["training.steps=3", "training.checkpoint_every=1", "training.keep_checkpoints=1", "training.batch_size=2"]
    refused(dressage(*asked, "--out", small_disk / "out"), "step-000002", "No space left", "stays")
    checkpoints = small_disk / "out" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000001"]
    assert json.loads((small_disk / "out" / "stage.json").read_text())["status"] == "interrupted"

    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    ran = dressage(*asked, "--out", small_disk / "out")
    assert ran.exit_code == 0 and re.search(r"sft\s+3/3", ran.stdout) and not re.search(r"sft\s+1/3", ran.stdout)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000003"]
