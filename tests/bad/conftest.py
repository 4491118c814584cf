"""What the cases are tried on."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bad import data, models
from bad.case import lines


@pytest.fixture(scope="package")
def ready(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `tiny`, a model, and `made`: what the stages make of it."""
    from typer.testing import CliRunner

    from dressage.cli import app

    place = tmp_path_factory.mktemp("ready")
    shutil.copytree(tiny_model, place / "tiny")
    made = place / "made"
    made.mkdir()
    (made / "data.jsonl").write_bytes(lines(*data.GOOD))
    (made / "rankings.jsonl").write_bytes(lines(*(data.RANKED | {"prompt": f"Question {n}"} for n in range(4))))
    small = ["lora.rank=2", "lora.alpha=4", "data.heldout_fraction=0", "training.batch_size=2"]
    runs = [
        shlex.split(models.AGAIN),
        [
            "reward",
            "model.name=made/sft/policy",
            "data.sources=[made/rankings.jsonl]",
            "depth=1",
            "training.steps=1",
            *small,
            "--out",
            "made/reward",
        ],
    ]
    here = Path.cwd()
    try:
        os.chdir(place)
        for run in runs:
            ran = CliRunner().invoke(app, run)
            assert ran.exit_code == 0, ran.output
    finally:
        os.chdir(here)
    # A stage ends with a collection; it need not look again and again at what the libraries hold.
    gc.collect()
    gc.freeze()
    yield place
    gc.unfreeze()
