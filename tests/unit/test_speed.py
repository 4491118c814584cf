"""The speed benchmark: what it computes, by hand; and that memory and time are those of the measured process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(Path(name).stem, FOLDER / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, Path(name).stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded("measuring.py", monkeypatch)


def test_a_ratio_is_of_medians_and_its_spread_of_pairs(measuring: ModuleType) -> None:
    """Medians 2 and 10; the pairs are 10/1, 10/2, 30/4."""
    assert measuring.ratio([1.0, 2.0, 4.0], [10.0, 10.0, 30.0]) == (5.0, 5.0, 10.0)


def test_flops_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens through one 2 x 5 matrix, of which one is scored over 7 words: 2 x 2 x (30 + 14)."""
    pages = loaded("pages.py", monkeypatch)
    assert pages.training_flops(10, tokens=3, answer_tokens=1, width=2, vocabulary=7) == 176


def test_memory_is_the_process_s_own_and_nothing_is_measured_twice(measuring: ModuleType, tmp_path: Path) -> None:
    """Measured from a process of its own: pytest's peak memory would be handed on. It must not have loaded torch."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(
        "import json, sys\n"
        "asked = json.loads(sys.argv[1])\n"
        "kept = b'x' * asked['bytes']\n"
        f"with open({str(tmp_path / 'log')!r}, 'a') as log: log.write('.')\n"
        "print('RESULT', json.dumps({'seconds': 1.0}))\n"
    )
    measure = (
        "import sys, pathlib, peers\n"
        "kept = peers.Kept(pathlib.Path(sys.argv[2]))\n"
        "for size in (1, 200_000_000, 1):\n"
        "    kept.measure(peers.Subject('w', str(size), sys.argv[1], {'bytes': size}), 1, 60)\n"
        "assert 'torch' not in sys.modules\n"
    )
    env = os.environ | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{FOLDER.parent / 'src'}"}
    subprocess.run([sys.executable, "-c", measure, script, out], env=env, check=True)
    assert (tmp_path / "log").read_text() == ".."
    small, large = measuring.Kept(out).runs
    assert small["peak_rss_gb"] < 0.15 < 0.2 <= large["peak_rss_gb"] < 0.35


def test_what_fails_is_told_and_not_kept(
    measuring: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such instruction')")
    kept = measuring.Kept(tmp_path / "out")
    kept.measure(measuring.Subject("w", "peer", str(script), {}), 1, 60)
    assert not kept.runs and "no such instruction" in capsys.readouterr().out


def run_of(work: str, name: str, repeat: int, memory: float, **result: Any) -> dict[str, Any]:
    told = {"compute": "float32", "versions": {}, "rows": 8, "padding_share": 0.04} | result
    return {
        "work": work, "subject": name, "repeat": repeat, "asked": {}, "result": told, "peak_rss_gb": memory,
        "load_before": 0.1, "commit": "0123abc" if name.startswith("ours") else None,
    }  # fmt: skip


def test_the_page_sets_each_peer_against_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages = loaded("pages.py", monkeypatch)
    runs = []
    for repeat in (1, 2, 3):
        runs += [
            run_of("sft", "ours, LoRA", repeat, 1.0, seconds=1.0 * repeat),
            run_of("sft", "ours, all weights", repeat, 2.0, seconds=2.0 * repeat),
            run_of("sft", "TRL, all weights, fp32", repeat, 8.0, seconds=12.0 * repeat),
            run_of("sampling", "ours", repeat, 1.0, tokens_per_second={"ours": {"16": 300}, "generate": {"16": 100}}),
        ]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs}))
    kept = pages.Kept(tmp_path)
    table = pages.table(kept)
    assert "| sft | TRL, all weights, fp32 | 24.00 (12.00 to 36.00) | 0.33 |  | 8.00 | **6.0** | **4.0** |" in table
    assert "| ours over generate | **3.00** |" in table
    assert "padding" in pages.page(kept, None, "speed.svg")
    ElementTree.fromstring(pages.picture(kept, None))
