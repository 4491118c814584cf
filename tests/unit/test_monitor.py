"""The log of a run: what is on disk, what resuming leaves, what the terminal shows, and what health says of it."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from rich.console import Console

from dressage.errors import DataError
from dressage.monitor.health import CHECKS, first_alarm, verdicts
from dressage.monitor.memory import peak_rss_gb, rss_gb
from dressage.monitor.metrics import METRICS, metric
from dressage.monitor.writers import TELLING, Monitor, clock, read_metrics, read_samples


def open_monitor(folder: Path, **more: Any) -> Monitor:
    return Monitor(folder, **({"stage": "ppo", "total_steps": 10, "console": None, "tensorboard": False} | more))


def run(folder: Path, first: int, last: int, **more: Any) -> None:
    """Steps first to last, each a line and a sample."""
    with open_monitor(folder, **more) as monitor:
        for step in range(first, last + 1):
            monitor.log(step, {"reward/score_mean": step / 10, "gold/mean": math.nan if step == 2 else 0.5})
            monitor.sample(step, f"prompt {step}", "答案", 0.1 * step, "stop")


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(folder)]


def test_a_resumed_run_leaves_the_file_of_one_that_never_stopped(tmp_path: Path) -> None:
    run(tmp_path / "whole", 1, 10)
    run(tmp_path / "cut", 1, 7)
    for file in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / "cut" / file).open("ab") as torn:
            torn.write('{"step": 8, "答'.encode()[:-1])
    run(tmp_path / "cut", 6, 10, start_step=5)
    assert without_seconds(tmp_path / "cut") == without_seconds(tmp_path / "whole")
    whole, cut = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_run_begun_anew_forgets_the_old_one(tmp_path: Path) -> None:
    with open_monitor(tmp_path) as monitor:
        monitor.log(0, {"loss/heldout": 9.0})
    with open_monitor(tmp_path) as monitor:
        monitor.log(0, {"loss/heldout": 1.0})
    assert without_seconds(tmp_path) == [{"step": 0, "loss/heldout": 1.0}]


def test_each_line_is_on_disk_at_once_and_survives_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_monitor(tmp_path) as monitor:
        monitor.log(1, {"loss/train": math.inf})
        line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
        assert json.loads(line)["loss/train"] is None and line.endswith("\n")
        raise RuntimeError
    assert read_metrics(tmp_path)[0]["step"] == 1


def test_seconds_go_on_where_they_stopped(tmp_path: Path) -> None:
    with open_monitor(tmp_path, start_step=4, seconds_before=100.0) as monitor:
        monitor.log(5, {})
    assert 100 <= read_metrics(tmp_path)[0]["seconds"] < 110


def test_a_torn_end_is_passed_over_and_a_torn_middle_is_not(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == [] == read_samples(tmp_path)
    file.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_a_plain_terminal_gets_a_line_now_and_then(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    with open_monitor(tmp_path, total_steps=100, console=console) as monitor:
        for step in range(1, 101):
            monitor.log(step, {"reward/score_mean": 0.25, "finished/share": 0.5, "kl/reference_per_answer": 2.0})
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[-1].startswith("ppo  100/100  score 0.25  KL 2  0:00")


def test_a_live_terminal_gets_a_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_monitor(tmp_path, console=Console(file=out, force_terminal=True, width=120)) as monitor:
        monitor.log(10, {"gold/mean": 0.125})
    assert "10/10  gold 0.125" in out.getvalue()


def test_an_answer_cannot_command_the_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_monitor(tmp_path, console=Console(file=out, width=200)) as monitor:
        monitor.sample(1, "\x1b[31mred\x07", "[bold]no markup[/bold]\r\n\x1b]0;title\x07", 1.0, "length")
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "[bold]no markup[/bold]" in out.getvalue() and "cut at the length limit" in out.getvalue()


def test_tensorboard_holds_the_same_curve_after_resuming(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, 1, 7, tensorboard=True)
    run(tmp_path, 6, 10, tensorboard=True, start_step=5)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curve = events.Scalars("reward/score_mean")
    assert [event.step for event in curve] == list(range(1, 11))
    assert [event.value for event in curve] == pytest.approx([step / 10 for step in range(1, 11)])


def test_without_tensorboard_there_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="no TensorBoard") as caught:
        run(tmp_path, 1, 3, tensorboard=True)
    assert len(caught) == 1 and len(read_metrics(tmp_path)) == 3


def test_every_name_used_is_in_the_table() -> None:
    used = {name for names in TELLING.values() for name in names}
    used |= {check.metric for checks in CHECKS.values() for check in checks}
    assert used <= METRICS.keys()


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("accuracy/train", 0.625, "62 %"),
        ("kl/reference_per_answer", 5.25, "5.250 nats"),
        ("loss/policy", -0.5, "−0.500"),
        ("tokens_per_second", 12345.6, "12,346 tokens/s"),
        ("learning_rate", 1.5e-8, "1.5e-08"),
        ("gold/mean", math.nan, "not a number"),
        ("unheard/of", 2, "2.000"),
    ],
)
def test_numbers_as_people_read_them(name: str, value: float, shown: str) -> None:
    assert metric(name).show(value).replace("\u00a0", " ") == shown


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 754, 3723)] == ["0:00", "1:00", "12:34", "1:02:03"]


HEALTHY: dict[str, list[float]] = {
    "reward/score_mean": [0.1 * k for k in range(12)],
    "gold/mean": [0.05 * k for k in range(12)],
    "reward/score_std": [0.8] * 12,
    "kl/reference_per_answer": [0.3 * k for k in range(12)],
    "kl/update_approx": [0.005] * 12,
    "clip/share": [0.1] * 12,
    "entropy/per_token": [1.6 - 0.03 * k for k in range(12)],
    "value/explained_variance": [-0.5 + 0.1 * k for k in range(12)],
    "length/mean_tokens": [40.0 - k for k in range(12)],
    "finished/share": [0.8] * 12,
    "distinct/share": [0.9] * 12,
    "ratio/first_max_error": [1e-6] * 12,
    "engine/max_logprob_difference": [1e-5] * 12,
    "loss/ptx": [2.0] * 12,
    "gradient/norm": [1.0] * 12,
}


def rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    steps = max(map(len, columns.values()))
    return [{"step": k + 1} | {name: values[k] for name, values in columns.items()} for k in range(steps)]


def test_a_healthy_run_has_nothing_to_say() -> None:
    found = verdicts("ppo", rows_of(HEALTHY))
    assert {verdict.metric for verdict in found} == HEALTHY.keys() - {"gold/mean"}
    assert [verdict for verdict in found if verdict.level != "ok"] == []


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ([1.0] * 5 + [1.5] * 15, "ok"),  # the longest texts came first
        ([1.0] * 10 + [1.2] * 10, "warn"),
        ([1.0] * 10 + [1.1] * 10, "ok"),
        ([1.0] * 4 + [2.0] * 4, None),  # too early to say
    ],
)
def test_memory_is_compared_with_the_runs_second_quarter(values: list[float], level: str | None) -> None:
    found = {verdict.metric: verdict.level for verdict in verdicts("sft", rows_of({"memory/rss_gb": values}))}
    assert found.get("memory/rss_gb") == level


def test_memory_in_use_goes_up_and_down_with_what_is_held() -> None:
    """By 200 MB of touched bytes, which numpy gives back at once."""
    before = rss_gb()
    held = numpy.ones(200_000_000, dtype=numpy.uint8)
    during = rss_gb()
    del held
    assert during - before == pytest.approx(0.2, abs=0.02) and rss_gb() - before == pytest.approx(0.0, abs=0.02)
    assert peak_rss_gb() >= during - 0.001


@pytest.mark.parametrize(
    ("score", "gold", "level"),
    [
        # Best three rounds 1.0, last three 8/15; squared differences of neighbours sum to 0.76 over 7, so a round's
        # error is 0.2330, and the fall 0.4667 / (0.2330 sqrt(2 / 3)) = 2.45 standard errors.
        ([0.1 * k for k in range(8)], [0.0, 0.5, 1.0, 1.0, 1.0, 0.9, 0.5, 0.2], "warn"),
        # The same with a last three of -1/5: sum 1.16 over 8, error 0.2693, fall 1.2 / 0.2198 = 5.46.
        ([0.1 * k for k in range(9)], [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.2, -0.2, -0.6], "stop"),
        # The score fell with it: no case of being fooled, only of learning nothing.
        ([-0.1 * k for k in range(8)], [0.0, 0.5, 1.0, 1.0, 1.0, 0.9, 0.5, 0.2], "warn"),
        ([0.1 * k for k in range(5)], [1.0, 0.8, 0.6, 0.3, 0.0], "ok"),  # too early to say
    ],
)
def test_gold_that_falls_from_its_best_by_hand(score: list[float], gold: list[float], level: str) -> None:
    rows = rows_of({"reward/score_mean": score, "gold/mean": gold})
    (verdict,) = (one for one in verdicts("ppo", rows) if one.metric == "reward/score_mean")
    assert verdict.level == level
    assert ("fooled" in verdict.reason) == (score[-1] > 0 and level != "ok")
    alarm = first_alarm("ppo", "reward/score_mean", rows, {})
    assert alarm == (rows[-1]["step"] if level == "stop" else None)


@pytest.mark.parametrize(
    ("name", "values", "level"),
    [
        ("gold/mean", [0.0] * 12, "warn"),
        ("gold/mean", [-0.1 * k for k in range(12)], "stop"),
        ("reward/score_mean", [1.0 - 0.1 * k for k in range(12)], "warn"),
        ("reward/score_mean", [0.1] * 11 + [None], "stop"),
        ("reward/score_std", [0.0005] * 12, "warn"),
        ("kl/reference_per_answer", [2.0 * k for k in range(12)], "ok"),
        ("kl/reference_per_answer", [3.0 * k for k in range(12)], "warn"),
        ("kl/reference_per_answer", [6.0 * k for k in range(12)], "stop"),
        ("kl/reference_per_answer", [0.0] * 9 + [-0.2] * 3, "stop"),
        ("kl/update_approx", [0.03] * 12, "warn"),
        ("kl/update_approx", [0.2] * 12, "stop"),
        ("clip/share", [0.4] * 12, "warn"),
        ("clip/share", [0.7] * 12, "stop"),
        ("entropy/per_token", [1.6 - 0.1 * k for k in range(12)], "warn"),
        ("entropy/per_token", [0.05] * 12, "stop"),
        ("value/explained_variance", [-0.2] * 12, "warn"),
        ("length/mean_tokens", [20.0 + 3 * k for k in range(12)], "warn"),
        ("length/mean_tokens", [64.0] * 12, "stop"),
        ("length/mean_tokens", [40.0] + [1.0] * 11, "stop"),
        ("finished/share", [0.8] + [0.5] * 11, "warn"),
        ("finished/share", [0.8] + [0.0] * 11, "stop"),
        ("distinct/share", [0.9] + [0.4] * 11, "warn"),
        ("distinct/share", [0.9] + [0.02] * 11, "stop"),
        ("ratio/first_max_error", [2e-3] + [0.0] * 11, "warn"),
        ("ratio/first_max_error", [0.02] + [0.0] * 11, "stop"),
        ("loss/ptx", [2.0] * 6 + [2.2] * 6, "warn"),
        ("loss/ptx", [2.0] * 6 + [2.5] * 6, "stop"),
        ("gradient/norm", [1.0] * 11 + [15.0], "warn"),
        ("gradient/norm", [1.0] * 11 + [None], "stop"),
    ],
)
def test_each_row_of_the_table(name: str, values: list[Any], level: str) -> None:
    """One number goes wrong at a time; its own verdict changes (gold speaks through the score) and no other."""
    settings = {"rollout": {"max_new_tokens": 64}, "kl": {"controller": "fixed"}}
    found = {verdict.metric: verdict for verdict in verdicts("ppo", rows_of(HEALTHY | {name: values}), settings)}
    about = "reward/score_mean" if name == "gold/mean" else name
    assert found[about].level == level
    assert {other for other, verdict in found.items() if verdict.level != "ok"} <= {about}
    assert found[about].reason and found[about].setting


def test_the_kl_target_is_the_runs_own() -> None:
    rows = rows_of({"kl/reference_per_answer": [6.5] * 12})
    settings = {"kl": {"controller": "proportional", "target_per_answer": 3.0}}
    assert [verdicts("ppo", rows, s)[0].level for s in (None, settings)] == ["ok", "warn"]


@pytest.mark.parametrize(
    ("stage", "columns", "levels"),
    [
        ("sft", {"loss/train": [2.0] * 9, "loss/heldout": [3.0, *[2.0] * 8]}, ["ok", "ok"]),
        ("sft", {"loss/heldout": [2.0, 1.5, 1.9]}, ["warn"]),
        ("sft", {"loss/heldout": [2.0, 2.1]}, ["warn"]),
        ("reward", {"accuracy/heldout": [0.5, 0.72], "loss/heldout": [0.7, 0.55]}, ["ok", "ok"]),
        ("reward", {"accuracy/heldout": [0.5, 0.58], "loss/heldout": [0.7, 0.72]}, ["warn", "warn"]),
        ("reward", {"accuracy/heldout": [0.5, 0.45]}, ["stop"]),
        ("rank", {"loss/train": [1.0]}, []),
    ],
)
def test_supervised_stages(stage: str, columns: dict[str, list[Any]], levels: list[str]) -> None:
    assert [verdict.level for verdict in verdicts(stage, rows_of(columns))] == levels


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own switch")
def test_freed_memory_is_kept_unless_somebody_has_said_otherwise() -> None:
    """In a process of its own: 20 MB taken and freed 50 times faults its pages in once, not 50 times."""
    program = (
        "import ctypes, resource, sys\n"
        "from dressage.monitor.memory import keep_freed_memory\n"
        "told = keep_freed_memory()\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "def once():\n"
        "    block = libc.malloc(20 << 20)\n"
        "    ctypes.memset(block, 1, 20 << 20)\n"
        "    libc.free(block)\n"
        "once()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(50): once()\n"
        "print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = []
    for more in ({}, {"MALLOC_MMAP_THRESHOLD_": "1000000"}):
        ran = subprocess.run([sys.executable, "-c", program], env=clean | more, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        told, faults = ran.stdout.split()
        found.append((told, int(faults)))
    pages = 50 * (20 << 20) // os.sysconf("SC_PAGESIZE")
    assert found[0][0] == "True" and found[0][1] < pages / 10
    assert found[1][0] == "False" and found[1][1] > pages / 2
