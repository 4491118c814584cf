"""What is said of a run is said of its stages as they are now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dressage.stages.comparing import summarise


def write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_a_stage_moved_aside_has_no_part_in_the_summary(tmp_path: Path) -> None:
    for name, rate, seconds in (("evaluate", 0.7, 3.0), ("evaluate.old-1", 0.2, 50.0)):
        write(tmp_path / name / "evaluation.json", {"win_rate": rate, "examples": ["not for the summary"]})
        write(tmp_path / name / "stage.json", {"seconds": seconds, "peak_rss_gb": seconds / 10})
    write(tmp_path / "reward" / "accuracy.json", {"accuracy": 0.8})
    write(tmp_path / "reward.old-1" / "accuracy.json", {"accuracy": 0.1})
    summary = summarise(tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["win_rate"] == 0.7
    assert summary["reward_accuracy"] == 0.8
    assert summary["seconds"] == {"evaluate": 3.0, "total": 3.0}
    assert summary["peak_rss_gb"] == 0.3
    assert "examples" not in summary
