"""Nothing is lost: a small part of benchmarks/faults.py, and what it has taught, each by itself."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dressage.config import SampleConfig, SftConfig
from dressage.errors import CheckpointError
from dressage.models.files import new_folder
from dressage.pipeline import result_settings, run_stage
from dressage.rewards.functions import FunctionReward
from dressage.schema import Completion, Message, Prompt, Rollout, Sampling
from dressage.stages.answers import write_lines
from dressage.stages.completions import Kept, completed, identity_of, parts
from dressage.training.checkpoint import Checkpoint, checkpoint_steps, load_checkpoint, save_checkpoint

Command = Callable[..., Any]
FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["faults"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faults = load()
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="the campaign watches its runs as Linux shows them")


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    """Commands, and a place to break them in."""
    faults.load_all()
    folder = tmp_path_factory.mktemp("faults")
    return faults.Trial(faults.make_world(folder, tiny_model), folder / "trial" / "run")


def known(trial: Any, name: str) -> Any:
    """The trial, knowing what this run should end with."""
    if name not in trial.wanted:
        trial.afresh()
        assert faults.start(trial.jobs[name], trial.folder).wait() == 0
        trial.wanted[name] = faults.contents(trial.folder)
    return trial


@needs_fork
@pytest.mark.parametrize(
    ("name", "operation", "moment"),
    [
        ("sft", 25, "saving a checkpoint"),
        ("sft, all weights", 70, "saving a product"),
        ("reward", 17, "between steps"),
        ("dpo", 36, "saving a checkpoint"),
        ("rl ppo", 30, "saving a checkpoint"),
        ("rl grpo", 36, "saving a checkpoint"),
        ("sample", 12, "keeping answers"),
    ],
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(name: str, operation: int, moment: str, trial: Any) -> None:
    fault = faults.kill_at_operation(known(trial, name), name, operation)
    assert fault.wrong is None
    assert fault.kind == moment, f"the run does other things now: choose another operation ({fault.what})"


@needs_fork
@pytest.mark.parametrize("operation", [20, 40])
def test_a_full_disk_is_told_and_leaves_what_was_there(operation: int, trial: Any) -> None:
    assert faults.full_at_operation(known(trial, "sft"), "sft", operation).wrong is None


@needs_fork
def test_no_memory_is_told_and_leaves_what_was_there(trial: Any) -> None:
    assert faults.out_of_memory(known(trial, "sft"), "sft", "", faults.no_memory_at(4)).wrong is None


@needs_fork
def test_the_same_command_while_it_runs_is_refused(trial: Any) -> None:
    assert faults.second_run(known(trial, "sft"), "sft").wrong is None


def test_the_campaign_would_notice(trial: Any, tmp_path: Path) -> None:
    """Bytes that differ, are missing or too many; a stage that says too early that it is done."""
    wanted = {"a/metrics.jsonl": b'{"loss": 1}', "a/stage.json": b'{"status": "done"}', "a/policy/weights": b"12"}
    for change in ({"a/policy/weights": b"13"}, {"a/more": b""}):
        assert faults.difference(wanted | change, wanted) and faults.difference(wanted, wanted | change)
    assert faults.difference(wanted, dict(wanted)) is None
    for name, made in wanted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(made)
    (tmp_path / "a" / "metrics.jsonl").write_text('{"loss": 1, "seconds": 3.5}\n')
    assert faults.contents(tmp_path) == wanted and faults.looks_whole(tmp_path, wanted) is None
    (tmp_path / "a" / "policy" / "weights").unlink()
    assert "weights is missing" in faults.looks_whole(tmp_path, wanted)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(step: int) -> Checkpoint:
    weights = {"w": torch.full((400,), float(step))}
    return Checkpoint(step, weights, {"w:exp_avg": torch.full((400,), -float(step))}, {"seconds": 1.5})


@pytest.mark.parametrize("damage", faults.DAMAGES, ids=lambda damage: damage.what)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage: Any, tmp_path: Path) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    damage.do(tmp_path / "checkpoints" / "step-000004")
    with pytest.warns(UserWarning, match=r"/step-0000(04|99): .*; the checkpoint before it is used"):
        found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 2 and torch.equal(found.weights["w"], checkpoint(2).weights["w"])
    assert checkpoint_steps(tmp_path) == [2]
    # The damaged one makes room for the new one, and is never kept in the place of a whole one.
    save_checkpoint(tmp_path, checkpoint(3), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    (tmp_path / "checkpoints" / "step-000003" / "state.json").unlink()
    (tmp_path / "checkpoints" / "step-000002" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"), pytest.warns(UserWarning):
        load_checkpoint(tmp_path)


def test_at_least_twenty_kinds_of_damage() -> None:
    assert len({damage.what for damage in faults.DAMAGES}) == len(faults.DAMAGES) >= 20


def test_the_millionth_step_is_newer_and_strangers_are_left_alone(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    (tmp_path / "checkpoints" / "my notes").mkdir()
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 1_000_000
    save_checkpoint(tmp_path, checkpoint(1_000_001), keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["my notes", "step-1000001"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a file that was never flushed is empty under its right name."""
    flushed, fsync = set(), os.fsync

    def watched(descriptor: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert not (tmp_path / "made").exists() or descriptor
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with new_folder(tmp_path / "made") as partial:
        (partial / "a").write_text("a")
        (partial / "b").write_text("b")
    assert {"a", "b", ".made.partial", tmp_path.name} <= flushed


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_move_aside_that_is_cut_short_leaves_no_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the checkpoints of other data would be gone on with: nothing but the manifest says whose they are."""
    folder, config = tmp_path / "run", SftConfig.model_validate({"data": {"sources": ["one.jsonl"]}})
    other = SftConfig.model_validate({"data": {"sources": ["two.jsonl"]}})
    run_stage("sft", config, folder, lambda config, place: [(place / name).mkdir() for name in ("checkpoints", "z")])
    rename, renamed = Path.rename, []

    def cut_short(self: Path, target: Path) -> Any:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", cut_short)
        with pytest.raises(KeyboardInterrupt):
            run_stage("sft", other, folder, lambda config, place: None)
    assert (folder / "stage.json").exists()
    seen: list[str] = []
    run_stage("sft", other, folder, lambda config, place: seen.extend(path.name for path in place.iterdir()))
    assert set(seen) == {".lock", "stage.json"}
    left = {path.name for path in tmp_path.glob("run.old-*/*")}
    assert left == {"checkpoints", "z", "stage.json"}


def test_a_run_out_of_memory_may_go_on_with_less_at_once() -> None:
    raw = {"data": {"sources": ["one.jsonl"]}}
    less = {**raw, "training": {"micro_batch_tokens": 128}}
    assert result_settings(SftConfig.model_validate(raw)) == result_settings(SftConfig.model_validate(less))
    asked = {"prompts": {"sources": ["one.jsonl"]}}
    one, two = (SampleConfig.model_validate(asked | {"max_batch": size}) for size in (64, 8))
    assert result_settings(one) == result_settings(two)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("our own fault"), False),
    ],
)
def test_out_of_memory_is_a_line(
    error: Exception, told: bool, dressage: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("dressage.recipe.recipes", fail)
    ran = dressage("recipes")
    assert ran.exit_code == (2 if told else 1)
    assert (ran.stderr.startswith("error: out of memory; lower training.micro_batch_tokens")) == told
    assert told or ran.exception is error


def test_a_thread_that_cannot_write_is_quiet_and_others_are_not(
    dressage: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("dressage.recipe.recipes", lambda: seen.append(threading.excepthook) or {})
    before = threading.excepthook
    dressage("recipes")
    assert threading.excepthook is before and seen[0] is not before
    monkeypatch.setattr(threading, "excepthook", seen[0])
    for error in (OSError(28, "No space left on device"), ValueError("of ours")):

        def fail(error: Exception = error) -> None:
            raise error

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert "No space left" not in said and "ValueError: of ours" in said


def test_half_a_file_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is full: a report, or answers."""
    (tmp_path / "answers.jsonl").write_text("before")

    def full(self: Path, target: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_lines(tmp_path / "answers.jsonl", [{"a": 1}])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"answers.jsonl": "before"}


# --- sampling ---------------------------------------------------------------------------------------------------------


class Counting:
    """An engine whose answer tells its prompt and how many equal prompts stood before it in the call."""

    def __init__(self, most: int = 1000) -> None:
        self.calls: list[int] = []
        self.most = most

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, progress: Any = None) -> list[Completion]:
        if len(self.calls) == self.most:
            raise KeyboardInterrupt
        self.calls.append(len(prompts))
        seen: dict[str, int] = {}
        made = []
        for prompt in prompts:
            seen[prompt.id] = seen.get(prompt.id, -1) + 1
            made.append(Completion((*prompt.tokens, seen[prompt.id]), (-0.1,) * (len(prompt.tokens) + 1), "stop"))
        return made

    def load_weights(self, version: int, weights: Any = ()) -> None:
        """Nothing changes."""


def prompts() -> list[Prompt]:
    """Ten prompts of which each is asked three times, the first once more at the end."""
    made = [Prompt((Message("user", str(n)),), tokens=(n,) * (1 + n % 4)) for n in range(10) for _ in range(3)]
    return [*made, made[0]]


@pytest.mark.parametrize("most", [1, 4, 7, 64])
def test_parts_hold_every_prompt_once_and_equal_ones_together(most: int) -> None:
    asked = prompts()
    cut = list(parts(asked, most))
    assert sorted(number for part in cut for number in part) == list(range(len(asked)))
    homes = [{asked[number].id for number in part} for part in cut]
    assert sum(map(len, homes)) == 10
    assert all(len(part) <= max(most, 4) for part in cut)
    lengths = [len(asked[number].tokens) for part in cut for number in part]
    assert lengths == sorted(lengths, reverse=True)


def test_sampling_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    """As `sample` did all in one call before: each answer is drawn as if it had been."""
    asked, sampling = prompts(), Sampling(4)
    whole = Counting().generate(asked, sampling)
    kept = Kept(tmp_path / "checkpoints" / "completions.jsonl", identity_of("settings", asked))
    with pytest.raises(KeyboardInterrupt):
        completed(Counting(most=3), asked, sampling, 6, kept)
    told: list[int] = []
    rest = Counting()
    assert completed(rest, asked, sampling, 6, kept, told.append) == whole
    assert len(rest.calls) == len(list(parts(asked, 6))) - 3 and told == sorted(told) and told[-1] == len(asked)
    # All is there: nothing is asked again, with other parts either.
    nothing = Counting()
    assert completed(nothing, asked, sampling, 9, kept) == whole and not nothing.calls
    other = Kept(kept.path, identity_of("other settings", asked))
    with pytest.warns(UserWarning, match="6 of 6 lines are cut, damaged or of another run"):
        assert other.read() == {}


@pytest.mark.parametrize("harm", ["cut", "flip", "garbage", "null"])
def test_a_damaged_part_is_told_and_sampled_again(harm: str, tmp_path: Path) -> None:
    asked, sampling = prompts(), Sampling(4)
    kept = Kept(tmp_path / "completions.jsonl", identity_of("settings", asked))
    whole = completed(Counting(), asked, sampling, 6, kept)
    lines = kept.path.read_text().splitlines()
    harmed = {"cut": lines[-1][:-9], "flip": lines[-1].replace("-0.1", "-0.3", 1), "garbage": "x", "null": "null"}
    kept.path.write_text("\n".join([*lines[:-1], harmed[harm]]))
    again = Counting()
    with pytest.warns(UserWarning, match=f"1 of {len(lines)} lines"):
        assert completed(again, asked, sampling, 6, kept) == whole
    assert len(again.calls) == 1 and kept.path.read_text().splitlines() == lines


# --- rewards ----------------------------------------------------------------------------------------------------------

ANSWERS = [Rollout(Prompt.of("Hi"), Completion((1,), (0.0,), "stop"), text, 0) for text in ("a", "bb", "ccc")]


def test_a_process_that_was_killed_meanwhile_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(faults.FUNCTIONS)
    grade = FunctionReward(f"{tmp_path / 'mine.py'}:length", 30)
    assert grade(ANSWERS) == [1.0, 2.0, 3.0]
    assert grade.process is not None
    grade.process.kill()
    grade.process.wait()
    assert grade(ANSWERS) == [1.0, 2.0, 3.0]
    grade.close()


@needs_fork
@pytest.mark.parametrize("hang", ["hangs_once", "hangs_once_in_a_pattern"])
def test_a_function_that_hangs_ends_with_its_run(hang: str, tmp_path: Path) -> None:
    """kill -9 leaves the run no time to end it; a pattern holds Python's lock, so no thread of its own could."""
    (tmp_path / "mine.py").write_text(faults.FUNCTIONS)
    run = os.fork()
    if run == 0:
        FunctionReward(f"{tmp_path / 'mine.py'}:{hang}", 600)(ANSWERS)
        os._exit(0)
    until = time.monotonic() + 60
    while not (tmp_path / "hung").exists() and time.monotonic() < until:
        time.sleep(0.01)
    (worker,) = faults._children_of(run)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    until = time.monotonic() + 20
    while faults._alive(worker) and time.monotonic() < until:
        time.sleep(0.01)
    left = faults._alive(worker)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left
