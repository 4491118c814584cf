"""`training.memory_gb` to tokens a micro-batch: by hand, in the dry run, and in the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dressage import assemble
from dressage.algorithms.catalog import algorithm
from dressage.cli import app
from dressage.config import DataConfig, LoraConfig, SftConfig, TrainingConfig
from dressage.errors import ConfigError
from dressage.models.files import load_backbone
from dressage.monitor.memory import has_arena
from dressage.settings import ModelConfig
from dressage.training.cost import CHUNK, KEPT, LOGITS, PROCESS_BYTES, Reader, Shape, memory_of, shape_of, within

SHAPE = Shape(
    weights=100_000_000, layer_weights=3_000_000, layer_ends=10_000, layer_kept=8_000, depth=30, width=576,
    vocabulary=50_000, cached=384, bytes_each=4,
)  # fmt: skip
READER = Reader(SHAPE, LoraConfig(rank=16, alpha=32, layers=10))
FIXED = PROCESS_BYTES + 4 * 100_000_000 + 16 * (10 * 10_000 * 16) + LOGITS * CHUNK * 50_000 * 4
EACH = KEPT[has_arena()] * 10 * 8_000 * 4


def test_tokens_by_hand() -> None:
    """What is left of the budget, in whole steps of 64 tokens."""
    for tokens in (64, 640, 6400):
        for more, expected in ((0.0, tokens), (63.0, tokens), (64.0, tokens + 64)):
            training = TrainingConfig(memory_gb=(FIXED + (tokens + more + 0.5) * EACH) / 1e9)
            assert within(training, SHAPE, 100_000_000, [READER]).micro_batch_tokens == expected


def test_without_a_budget_nothing_changes() -> None:
    training = TrainingConfig(micro_batch_tokens=777)
    assert within(training, SHAPE, 100_000_000, [READER]) is training


def test_too_little_is_an_error_that_says_how_much_is_enough() -> None:
    with pytest.raises(ConfigError, match=r"memory_gb=0\.5: .*take 1\.0 GB; set it to 1\.1 or more"):
        within(TrainingConfig(memory_gb=0.5), SHAPE, 100_000_000, [READER])
    assert within(TrainingConfig(memory_gb=1.1), SHAPE, 100_000_000, [READER]).micro_batch_tokens >= 64


def test_dry_run_and_run_agree(tiny_model: Path, tmp_path: Path) -> None:
    """A budget small enough to show in the dry run's longest micro-batch, and the same tokens in the learner."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "Question {i}?", "completion": "Answer."}}\n' for i in range(40)))
    model = ModelConfig(name=str(tiny_model), system="")
    settings = SftConfig(
        model=model, data=DataConfig(sources=(str(data),)), lora=LoraConfig(rank=4, alpha=8),
        training=TrainingConfig(batch_size=32, memory_gb=0.4825),
    )  # fmt: skip
    backbone = load_backbone(model)
    role = assemble.build_role(backbone, "policy", settings.lora, seed=1)
    learner = assemble.build_learner(algorithm("sft"), role, settings, 1)
    tokens = learner.micro_batch_tokens
    assert tokens % 64 == 0 and 64 <= tokens < 1024
    told = []
    for cut in ("memory_gb=0.4825", f"micro_batch_tokens={tokens}", f"micro_batch_tokens={tokens * 4}"):
        asked = [
            "sft", f"model.name={tiny_model}", "model.system=", f'data.sources=["{data}"]', "lora={rank: 4, alpha: 8}",
            "training.batch_size=32", f"training.{cut}", "--out", str(tmp_path / "out"), "--dry-run",
        ]  # fmt: skip
        ran = CliRunner().invoke(app, asked)
        assert ran.exit_code == 0, ran.output
        told.append(next(line for line in ran.stdout.splitlines() if "micro-batch" in line))
    assert told[0] == told[1] != told[2]


def test_a_text_beyond_the_budget_is_told(tiny_model: Path, tmp_path: Path) -> None:
    """Micro-batches are of whole texts: one that is larger than the budget's is computed all the same."""
    model, lora = ModelConfig(name=str(tiny_model), system=""), LoraConfig(rank=4, alpha=8)
    shape = shape_of(model)
    reader = Reader(shape, lora)
    budget = (memory_of(shape, shape.weights, reader.learning, 0.0) + 64.5 * reader.kept_bytes) / 1e9
    told, while_running = {}, {}
    for words in (1, 60):
        data = tmp_path / f"{words}.jsonl"
        data.write_text(f'{{"prompt": "Question?", "completion": "{"Answer. " * words}"}}\n' * 20)
        asked = [
            "sft", f"model.name={tiny_model}", "model.system=", f'data.sources=["{data}"]', "lora={rank: 4, alpha: 8}",
            f"training.memory_gb={budget}", "--out", str(tmp_path / f"out-{words}"), "training.steps=1",
        ]  # fmt: skip
        for said, more in ((told, ["--dry-run"]), (while_running, [])):
            ran = CliRunner().invoke(app, [*asked, *more])
            assert ran.exit_code == 0, ran.output
            said[words] = " ".join(ran.output.split())
    assert "above training.memory_gb" not in told[1]
    assert f"above training.memory_gb={budget}: no text or ranking is cut; one has" in told[60]
    assert "has room for" not in while_running[1]
    assert f"training.memory_gb={budget} has room for 64 tokens at once, and no text or ranking" in while_running[60]


def test_too_little_is_said_before_anything_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "Question {i}?", "completion": "Answer."}}\n' for i in range(8)))
    monkeypatch.setattr("dressage.stages.learning.load_backbone", lambda *_: pytest.fail("loaded"))
    arguments = ["sft", f"model.name={tiny_model}", f"data.sources=[{data}]", "training.memory_gb=0.4"]
    ran = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert ran.exit_code == 2 and "memory_gb=0.4" in ran.output and not (tmp_path / "out").exists()
