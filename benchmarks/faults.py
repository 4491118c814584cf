"""Breaks runs on purpose, in every way we know, and looks whether anything was lost.

    python benchmarks/faults.py [--kills 60] [--points 20] [--only kills,disk] [--seed 1] [--out runs/faults]

A model of two layers with random weights and a handful of rows; every verb that learns or samples, and a pipeline of
them. Each run is a process of its own, forked from this one, which has loaded torch once. First every run is made
twice, undisturbed: that is what it should be. Then, part by part (PARTS below), it is killed, starved or lied to, and
the same command is given again. A run that went on must end with the same bytes: products, checkpoints, samples and
metrics (but for times). Prints a line for each fault and a table, writes OUT/results.json, and exits with 1 if anything
was not as promised. docs/reliability.md says what is promised. Linux; the disk is a real full one if we are root.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import json
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LONGEST = 60.0
"""Seconds after which a run counts as hanging."""
TIMES = ("seconds", "per_second", "rss_gb")
"""What may differ between equal runs: names that hold one of these."""
SPARED = (".lock", "report.html", ".report.html.partial", "manifest.json")
"""Files that are not compared."""
Hook = Callable[["Child"], None]
"""What is done in a run's process before the command begins."""


# --- a small world: a model, rows, and a command for every verb


@dataclass(frozen=True)
class Job:
    """A command, all but its --out."""

    name: str
    arguments: Sequence[str]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUNCTIONS = """
import os, re, signal, time
from pathlib import Path

MARKER = Path(__file__).with_name("hung")

def length(answers, **_):
    return [float(len(answer)) for answer in answers]

def on_many(broken):
    # Sound on the two answers with which a part is tried before the run begins.
    return lambda answers, **_: length(answers) if len(answers) <= 2 else broken(answers)

def pattern():
    return re.match("(a+)+$", "a" * 60 + "b")  # for years, and with Python's lock

def once(hang):
    def hang_once(answers):
        if not MARKER.exists():
            MARKER.touch()
            hang()
        return length(answers)
    return on_many(hang_once)

raises = on_many(lambda answers: 1 / 0)
hangs = on_many(lambda answers: time.sleep(600))
hangs_in_a_pattern = on_many(lambda answers: pattern())
gives_nan = on_many(lambda answers: [float("nan")] * len(answers))
gives_infinity = on_many(lambda answers: [float("inf")] * len(answers))
gives_nothing = on_many(lambda answers: None)
gives_too_few = on_many(lambda answers: [1.0])
gives_text = on_many(lambda answers: ["good"] * len(answers))
has_no_memory = on_many(lambda answers: bytearray(2**62))
exits = on_many(lambda answers: os._exit(3))
is_killed = on_many(lambda answers: os.kill(os.getpid(), signal.SIGKILL))
hangs_once = once(lambda: time.sleep(600))
hangs_once_in_a_pattern = once(pattern)
"""
BROKEN = ("raises", "hangs", "hangs_in_a_pattern", "gives_nan", "gives_infinity", "gives_nothing", "gives_too_few")
BROKEN += ("gives_text", "has_no_memory", "exits", "is_killed")
PIPELINE = """
model: {{name: {model}}}
stages:
  sft:
    data: {{sources: [{rows}], heldout_fraction: 0.4}}
    lora: {{rank: 2, alpha: 4}}
    training: {{steps: 4, batch_size: 4, checkpoint_every: 2}}
  samples:
    kind: sample
    model: {{name: "stage:sft/policy"}}
    prompts: {{sources: [{rows}]}}
    answers_per_prompt: 3
    max_new_tokens: 8
    max_batch: 12
  rank: {{answers: "stage:samples/answers.jsonl"}}
  reward:
    model: {{name: "stage:sft/policy"}}
    data: {{sources: ["stage:rank/rankings.jsonl"], heldout_fraction: 0.3}}
    depth: 1
    lora: {{rank: 2, alpha: 4}}
    training: {{steps: 3, batch_size: 4, checkpoint_every: 1}}
  ppo:
    model: {{name: "stage:sft/policy"}}
    prompts: {{sources: [{rows}], heldout_fraction: 0.0}}
    reward_model: "stage:reward/reward"
    lora: {{rank: 2, alpha: 4}}
    rollout: {{prompts_per_step: 4, max_new_tokens: 8}}
    minibatch_size: 2
    training: {{steps: 3, checkpoint_every: 1}}
"""


def write_tiny_model(folder: Path) -> None:
    """A random Llama of two layers and a tokenizer that writes bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_world(folder: Path, model: Path | None = None) -> dict[str, Job]:
    """Jobs by name, on files made under `folder`; a reward model is learnt there first."""
    if model is None:
        model = folder / "model"
        write_tiny_model(model)
    names = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea"]
    rows = [{"prompt": f"Who is {name}?", "completion": f"{name} is a friend."} for name in names]
    ranked = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No."} for row in rows]
    for name, lines in {"rows.jsonl": rows, "ranked.jsonl": ranked}.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "mine.py").write_text(FUNCTIONS, encoding="utf-8")
    (folder / "loop.yaml").write_text(PIPELINE.format(model=model, rows=folder / "rows.jsonl"), encoding="utf-8")

    shared = [f"model.name={model}"]
    learning = [*shared, f'data.sources=["{folder / "rows.jsonl"}"]', "data.heldout_fraction=0.4"]
    judged = [*shared, f'data.sources=["{folder / "ranked.jsonl"}"]', "data.heldout_fraction=0.4"]
    asking = [*shared, f'prompts.sources=["{folder / "rows.jsonl"}"]', "prompts.heldout_fraction=0"]
    steps = "training={steps: 6, batch_size: 4, checkpoint_every: 2, evaluate_every: 3}"
    rounds = "training={steps: 4, checkpoint_every: 1, micro_batch_tokens: 256}"
    lora, scorer = "lora={rank: 2, alpha: 4}", folder / "scorer"
    mine = f"rewards.mine={{type: function, function: '{folder / 'mine.py'}:length'}}"
    short = "rollout={prompts_per_step: 8, max_new_tokens: 16}"
    groups = "rollout={prompts_per_step: 3, answers_per_prompt: 4, max_new_tokens: 16}"
    model_scores, best = f"reward_model={scorer}/reward", ["answers_per_prompt=2", "best_of=2"]
    jobs = [
        Job("sft", ["sft", *learning, "lora={rank: 2, alpha: 4, dropout: 0.1}", steps]),
        Job("sft, all weights", ["sft", *learning, "lora=null", steps]),
        Job("reward", ["reward", *judged, lora, steps]),
        Job("dpo", ["dpo", *judged, lora, steps]),
        Job(
            "rl ppo",
            ["rl", *asking, lora, rounds, short, model_scores, "minibatch_size=4", "kl.controller=proportional"],
        ),
        Job("rl grpo", ["rl", "grpo", *asking, lora, rounds, groups, "reward_model=null", mine, "minibatch_size=null"]),
        Job("sample", ["sample", *asking, *best, model_scores, "max_new_tokens=16", "max_batch=8"]),
        Job("run", ["run", str(folder / "loop.yaml")]),
    ]
    if not scorer.exists():
        child = start(Job("", ["reward", *judged, lora, "training={steps: 2, batch_size: 4}"]), scorer)
        if (code := child.wait()) != 0:
            raise RuntimeError(f"the reward model could not be learnt ({code}): {child.said()}")
    return {job.name: job for job in jobs}


# --- one run, in a process of its own


@dataclass
class Child:
    """A run, seen from here and from within."""

    folder: Path
    pid: int = 0
    board: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 4096))
    """Memory that both sides see: where the run is, and how many file operations it has done."""
    code: int | None = None

    @property
    def moment(self) -> str:
        """What the run is, or was last, at."""
        return self.board[8:].rstrip(b"\0").decode()

    @moment.setter
    def moment(self, name: str) -> None:
        self.board[8:] = name.encode()[: len(self.board) - 8].ljust(len(self.board) - 8, b"\0")

    @property
    def operations(self) -> int:
        """File operations done so far, where they are counted."""
        return int.from_bytes(self.board[:8], "little")

    @operations.setter
    def operations(self, number: int) -> None:
        self.board[:8] = number.to_bytes(8, "little")

    @property
    def log(self) -> Path:
        """What it said."""
        return self.folder.with_name(f"{self.folder.name}.{self.pid or os.getpid()}.log")

    def said(self) -> str:
        """Its stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def complaint(self) -> list[str]:
        """The lines of its error, or of its traceback, which no user should see."""
        lines = self.said().splitlines()
        return ["a traceback"] if "Traceback" in self.said() else [one for one in lines if one.startswith("error: ")]

    def wait(self, seconds: float = LONGEST) -> int | None:
        """Its exit code, minus the signal that killed it; None if it hangs, and then it is ended."""
        until = time.monotonic() + seconds
        while self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None
            else:
                time.sleep(0.002)
        return self.code

    def kill(self) -> int | None:
        """kill -9; its exit code, which is another if it was done before."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def start(job: Job, folder: Path, hook: Hook | None = None) -> Child:
    """The job in a fork of this process, its output in a file beside the folder."""
    child = Child(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child.pid = os.fork()
    if child.pid == 0:
        os._exit(_within(child, job, hook))
    return child


def _within(child: Child, job: Job, hook: Hook | None) -> int:
    log = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(log), "w", buffering=1, encoding="utf-8") for _ in range(2))
    os.environ |= {"NO_COLOR": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    gc.freeze()  # what was loaded before need not be looked through again and again
    code: Any = 1
    try:
        import torch

        from dressage import cli

        torch.set_num_threads(1)
        _watch_moments(child)
        if hook is not None:
            hook(child)
        sys.argv = ["dressage", *job.arguments, "--out", str(child.folder)]
        cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    return int(code or 0)


def _watch_moments(child: Child) -> None:
    """The run tells what it is at."""
    from dressage.rollout.native import NativeEngine
    from dressage.stages import answering, learning
    from dressage.stages.completions import Kept
    from dressage.training import trainer
    from dressage.training.update import Learner

    def marked(owner: Any, name: str, moment: str) -> None:
        inner = getattr(owner, name)

        def outer(*given: Any, **named: Any) -> Any:
            before, child.moment = child.moment, moment
            made = inner(*given, **named)
            child.moment = before  # not if it failed: that is the moment to be told
            return made

        setattr(owner, name, outer)

    child.moment = "before or between stages"
    for module, names in ((learning, ("sft", "reward", "dpo", "ppo")), (answering, ("sample",))):
        for name in names:
            marked(module, name, "loading and preparing")
    from dressage import stages

    stages.WORK = dict(stages.WORK) | {
        name: getattr(module, name)
        for module in (learning, answering)
        for name in stages.WORK
        if hasattr(module, name) and name not in ("rank", "evaluate")
    }
    marked(learning, "train", "between steps")
    marked(Learner, "update", "in an update")
    marked(NativeEngine, "generate", "sampling")
    marked(trainer, "save_checkpoint", "saving a checkpoint")
    marked(learning, "save_role", "saving a product")
    marked(answering, "write_lines", "saving a product")
    marked(Kept, "add", "keeping answers")


# --- what a run is


def contents(folder: Path) -> dict[str, bytes]:
    """All that a run left, but for what may differ: times, looks (report, TensorBoard) and the lock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # The report is written anew at the end of every command, over what a kill left of one.
        if not path.is_file() or path.name in SPARED or "tensorboard/" in name:
            continue
        whole = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = whole.decode().splitlines() if path.suffix == ".jsonl" else [whole.decode()]
            whole = "\n".join(json.dumps(_timeless(json.loads(line))) for line in lines).encode()
        found[name] = whole
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not any(time in key for time in TIMES)}
    return value


def difference(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> str | None:
    """The first file that is not as it should be."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} should not be there"
        if found[name] != wanted[name]:
            return f"{name} differs"
    return None


@dataclass(frozen=True)
class Fault:
    """One thing that was done to a run, and what came of it."""

    part: str
    job: str
    what: str
    """What was done, and when."""
    kind: str
    """For the table: which sort of fault, or of moment."""
    wrong: str | None = None
    """What was not as promised."""


def resumed(trial: Trial, name: str) -> str | None:
    """Gives the command again; what is wrong with the end of it, if anything."""
    child = start(trial.jobs[name], trial.folder)
    if (code := child.wait()) != 0:
        return f"the same command again gave {code}: {child.said()[-300:]}"
    return difference(contents(trial.folder), trial.wanted[name])


@dataclass
class Trial:
    """Where runs are made and broken, and what each should end with."""

    jobs: Mapping[str, Job]
    folder: Path
    """Of every run: paths stand in some products, so they are the same each time."""
    wanted: dict[str, dict[str, bytes]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def afresh(self) -> None:
        """Nothing is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for log in self.folder.parent.glob(f"{self.folder.name}.*.log"):
            log.unlink()


def undisturbed(trial: Trial, name: str) -> Fault:
    """Makes the run twice; what it leaves is what it should always leave."""
    made = []
    for _ in range(2):
        trial.afresh()
        began = time.monotonic()
        child = start(trial.jobs[name], trial.folder)
        if (code := child.wait()) != 0:
            return Fault("twice", name, "made twice", "the same again", f"gave {code}: {child.said()[-1000:]}")
        trial.seconds[name] = time.monotonic() - began
        made.append(contents(trial.folder))
    trial.wanted[name] = made[0]
    return Fault("twice", name, "made twice", "the same again", difference(made[1], made[0]))


# --- kill -9


def looks_whole(folder: Path, wanted: Mapping[str, bytes]) -> str | None:
    """A stage whose manifest says that it is done must be; what is wrong, if one is not."""
    for path in [*folder.glob("stage.json"), *folder.glob("*/stage.json")]:
        if json.loads(path.read_text(encoding="utf-8"))["status"] == "done":
            inside = "" if path.parent == folder else f"{path.parent.name}/"
            should = {name.removeprefix(inside): made for name, made in wanted.items() if name.startswith(inside)}
            if (wrong := difference(contents(path.parent), should)) is not None:
                return f"{path} says that it is done, but {wrong}"
    return None


def random_kills(trial: Trial, kills: int, draw: random.Random) -> Iterator[Fault]:
    """kill -9 at any moment of a run, sometimes twice, before it may go on to its end."""
    done, names = 0, list(trial.wanted)
    while done < kills:
        name = names[done % len(names)]
        trial.afresh()
        moments, wrong = [], None
        for _ in range(min(kills - done, draw.choice([1, 1, 2]))):
            child = start(trial.jobs[name], trial.folder)
            time.sleep(draw.uniform(0.02, trial.seconds[name]))
            if child.kill() != -signal.SIGKILL:
                break  # it had ended already: no fault, not counted
            moments.append(child.moment)
            wrong = wrong or looks_whole(trial.folder, trial.wanted[name])
        if moments:
            wrong = wrong or resumed(trial, name)
        done += len(moments)
        yield from (Fault("kills", name, f"killed {moment}", moment, wrong) for moment in moments)


Then = Callable[[Child, str, Any], None]
WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def at_operations(then: Then) -> Hook:
    """Before each thing that a run does to its files, `then` is called with what it is.

    Opening to write, renaming, making and removing are seen by Python's audit; the line of a log and the file of
    tensors, which Rust writes, are seen here.
    """

    def hook(child: Child) -> None:
        from dressage.models import files
        from dressage.monitor import writers

        def happens(what: str, given: Any) -> None:
            child.operations += 1
            then(child, what, given)

        def audited(event: str, given: tuple[Any, ...]) -> None:
            if event not in WRITES or not isinstance(given[0], str | os.PathLike):
                return
            # Where a tree is removed, names come without their folder.
            ours = Path(given[0]).is_relative_to(child.folder) or (event == "os.remove" and given[1] >= 0)
            if ours and (event != "open" or given[2] & (os.O_WRONLY | os.O_RDWR)):
                happens(event, given)

        append, save_file = writers._append, files.save_file

        def appended(file: Any, row: Any) -> None:
            happens("append", (file, writers._line(row)))
            append(file, row)

        def saved(tensors: Any, path: Path) -> None:
            happens("tensors", path)
            save_file(tensors, path)

        writers._append, files.save_file = appended, saved
        sys.addaudithook(audited)

    return hook


def killed_at(number: int) -> Hook:
    """kill -9 before the file operation of this number; of a line or a file of tensors, when a part is written."""

    def then(child: Child, what: str, given: Any) -> None:
        if child.operations == number:
            if what == "append":
                file, line = given
                file.write(line[: len(line) // 2])
                file.flush()
            elif what == "tensors":
                given.write_bytes(b"\0" * 100)
            os.kill(os.getpid(), signal.SIGKILL)

    return at_operations(then)


def operations_of(trial: Trial, name: str) -> int:
    """How many file operations an undisturbed run does."""
    trial.afresh()
    child = start(trial.jobs[name], trial.folder, at_operations(lambda *_: None))
    child.wait()
    return child.operations


def kill_at_operation(trial: Trial, name: str, number: int) -> Fault:
    """Killed there, looked at, and gone on with."""
    trial.afresh()
    child = start(trial.jobs[name], trial.folder, killed_at(number))
    code = child.wait()
    wrong = None if code == -signal.SIGKILL else f"was not killed, but ended with {code}: {child.said()[-300:]}"
    wrong = wrong or looks_whole(trial.folder, trial.wanted[name]) or resumed(trial, name)
    return Fault("operations", name, f"killed at file operation {number}, {child.moment}", child.moment, wrong)


# --- damaged checkpoints


@dataclass(frozen=True)
class Damage:
    """Something done to a checkpoint's folder."""

    what: str
    do: Callable[[Path], object]


def _flip(name: str, where: float) -> Damage:
    def do(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[int(where * (len(raw) - 1))] ^= 1
        (folder / name).write_bytes(raw)

    return Damage(f"a bit of {name} flipped, at {where:.0%} of it", do)


def _cut(name: str, keep: float) -> Damage:
    def do(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(keep * len(raw))])

    return Damage(f"{name} cut to {keep:.0%}", do)


def _put(name: str, text: str, what: str) -> Damage:
    return Damage(f"{name}: {what}", lambda folder: (folder / name).write_text(text, encoding="utf-8"))


def _swap(folder: Path) -> None:
    one, other = folder / "weights.safetensors", folder / "moments.safetensors"
    whole = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(whole)


def _older(folder: Path) -> None:
    shutil.copy(sorted(folder.parent.glob("step-*"))[0] / "weights.safetensors", folder)


def _unlist(folder: Path) -> None:
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    listed.pop("weights.safetensors")
    (folder / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")
    (folder / "weights.safetensors").write_bytes(b"")


def _another_hash(folder: Path) -> None:
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    listed["moments.safetensors"] = listed["weights.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")


def _a_folder_instead(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()


FILES = ("weights.safetensors", "moments.safetensors", "state.json", "manifest.json")
DAMAGES = (
    *(Damage(f"{name} lost", lambda folder, name=name: (folder / name).unlink()) for name in FILES),
    *(_cut(name, keep) for name in FILES for keep in (0.0, 0.7)),
    *(_flip(name, where) for name in FILES[:3] for where in (0.0, 0.5, 1.0)),
    _put("manifest.json", "{}", "an empty list of files"),
    _put("manifest.json", "null", "null"),
    _put("manifest.json", '["weights.safetensors"]', "names without hashes"),
    _put("manifest.json", "\0" * 300, "zeros, as a power cut leaves them"),
    _put("weights.safetensors", "\0" * 4000, "zeros, as a power cut leaves them"),
    Damage("another file's hash in manifest.json", _another_hash),
    Damage("weights.safetensors empty, and not in manifest.json", _unlist),
    Damage("weights and moments swapped", _swap),
    Damage("the weights of the checkpoint before", _older),
    Damage("state.json is a folder", _a_folder_instead),
    Damage("all files lost", lambda folder: [path.unlink() for path in folder.iterdir()]),
    Damage("the folder named as a later step", lambda folder: folder.rename(folder.with_name("step-000099"))),
    Damage("the folder is a file", lambda folder: (shutil.rmtree(folder), folder.write_text("x"))),
)


def killed_after_checkpoint(number: int) -> Hook:
    """kill -9 when so many checkpoints have been saved."""

    def hook(child: Child) -> None:
        from dressage.training import trainer

        save, saved = trainer.save_checkpoint, []

        def then_killed(*given: Any) -> Path:
            saved.append(save(*given))
            if len(saved) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return saved[-1]

        trainer.save_checkpoint = then_killed

    return hook


def damaged(trial: Trial, name: str, damages: Sequence[Damage] = DAMAGES) -> Iterator[Fault]:
    """The newer of two checkpoints of a run that was killed is damaged, in every way; in the end both."""
    saved = trial.folder.with_name("saved")
    shutil.rmtree(saved, ignore_errors=True)
    trial.afresh()
    code = start(trial.jobs[name], trial.folder, killed_after_checkpoint(2)).wait()
    assert code == -signal.SIGKILL, code
    trial.folder.rename(saved)
    before, newest = sorted(path.name for path in (saved / "checkpoints").glob("step-*"))
    for damage in damages:
        shutil.copytree(saved, trial.folder)
        damage.do(trial.folder / "checkpoints" / newest)
        (place,) = (path for path in (trial.folder / "checkpoints").glob("step-*") if path.name != before)
        child = start(trial.jobs[name], trial.folder)
        code = child.wait()
        warnings = [line for line in child.said().splitlines() if line.startswith(f"warning: {place}: ")]
        wrong = None if code == 0 else f"gave {code}: {child.said()[-300:]}"
        if wrong is None and not any("the checkpoint before it is used" in line for line in warnings):
            wrong = "the damaged checkpoint was not named"
        wrong = wrong or difference(contents(trial.folder), trial.wanted[name])
        trial.afresh()
        yield Fault("checkpoints", name, damage.what, "one of two damaged", wrong)
    shutil.copytree(saved, trial.folder)
    for path in (trial.folder / "checkpoints").glob("step-*"):
        _flip("weights.safetensors", 0.5).do(path)
    wrong = ends_with_a_line(start(trial.jobs[name], trial.folder), "every checkpoint is damaged")
    yield Fault("checkpoints", name, "both damaged", "all damaged", wrong)
    shutil.rmtree(saved)


def ends_with_a_line(child: Child, *words: str, code: int = 2) -> str | None:
    """What is wrong, unless the run ends with this code and an error of one or two lines that hold these words."""
    found, told = child.wait(), child.complaint()
    if found == code and 1 <= len(told) <= 2 and any(word in line for word in words for line in told):
        return None
    return f"gave {found}: {child.said()[-400:]}"


# --- a full disk

FULL, ENOUGH = "full", "just enough room"


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[], None]]:
    """A disk of this size at `folder`; calling what is given makes room. PermissionError if we are not root."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, f"size={kilobytes}k", "none", folder], capture_output=True).returncode:
        raise PermissionError("no disk can be mounted here")
    try:
        yield lambda: subprocess.run([*mount, "remount,size=64m", "none", folder], check=True) and None
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def full_disk(trial: Trial, name: str, kilobytes: int) -> Fault:
    """A disk that is full after so much; then there is room, and the run goes on."""
    trial.afresh()
    with small_disk(trial.folder, kilobytes) as make_room:
        child = start(trial.jobs[name], trial.folder)
        code = child.wait()
        moment = child.moment
        wrong = None if code == 0 else ends_with_a_line(child, "No space left", "disk is full")
        wrong = wrong or looks_whole(trial.folder, trial.wanted[name])
        make_room()
        wrong = wrong or resumed(trial, name)
    trial.afresh()
    kind = ENOUGH if code == 0 else FULL
    return Fault("disk", name, f"full after {kilobytes} kB, {moment}", kind, wrong)


def full_from(number: int) -> Hook:
    """From the file operation of this number on nothing can be written, as on a full disk."""

    def then(child: Child, what: str, given: Any) -> None:
        if child.operations >= number and what not in ("os.remove", "os.rmdir", "os.rename"):
            path = given if what == "tensors" else given[0] if what != "append" else None
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if path is None else str(path))

    return at_operations(then)


def full_at_operation(trial: Trial, name: str, number: int) -> Fault:
    """As `full_disk`, without a disk of its own: each write fails from one on."""
    trial.afresh()
    child = start(trial.jobs[name], trial.folder, full_from(number))
    # After the last write nothing fails any more.
    code = child.wait()
    wrong = None if code == 0 else ends_with_a_line(child, "No space left", "disk is full")
    wrong = wrong or looks_whole(trial.folder, trial.wanted[name]) or resumed(trial, name)
    kind = ENOUGH if code == 0 else FULL
    return Fault("writes", name, f"full from file operation {number} on, {child.moment}", kind, wrong)


# --- memory


def little_memory(megabytes: float) -> Hook:
    """A real limit of the system's, from the first update on."""

    def hook(child: Child) -> None:
        from dressage.training.update import Learner

        update = Learner.update

        def limited(self: Any, batches: Any) -> Any:
            if not child.operations:
                child.operations += 1
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + int(megabytes * 2**20)
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
            return update(self, batches)

        Learner.update = limited

    return hook


def no_memory_at(step: int) -> Hook:
    """PyTorch's own error, as a CPU gives it, in an update of this number."""

    def hook(child: Child) -> None:
        import torch

        from dressage.training.update import Learner

        update, count = Learner.update, [0]

        def starved(self: Any, batches: Any) -> Any:
            count[0] += 1
            if count[0] == step:
                torch.empty(2**60, dtype=torch.uint8)
            return update(self, batches)

        Learner.update = starved

    return hook


def out_of_memory(trial: Trial, name: str, what: str, hook: Hook) -> Fault:
    """Starved; then there is memory, and the run goes on."""
    trial.afresh()
    child = start(trial.jobs[name], trial.folder, hook)
    code = child.wait()
    kind = {0: "there was just enough", 2: "told in a line"}.get(code or 0, "ended by the system")
    wrong = None
    if code == 2:
        wrong = ends_with_a_line(child, "out of memory")
    elif code not in (0, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL, -signal.SIGBUS):
        wrong = f"gave {code}: {child.said()[-600:]}"
    wrong = wrong or looks_whole(trial.folder, trial.wanted[name]) or resumed(trial, name)
    return Fault("memory", name, f"{what}, {child.moment}", kind, wrong)


# --- rewards that fail


def with_function(job: Job, function: str, *settings: str) -> Job:
    """The same with another of the functions of mine.py for its reward."""
    kept = [one.replace(":length'", f":{function}', timeout_seconds: 2, on_failure: -2") for one in job.arguments]
    return Job(job.name, [*kept, *settings])


def broken_reward(trial: Trial, how: str) -> Fault:
    """A function that breaks in every round: each answer is counted, none is dropped, and the run ends well."""
    trial.afresh()
    child = start(with_function(trial.jobs["rl grpo"], how, "health.on_alarm=warn"), trial.folder)
    code = child.wait()
    wrong = None if code == 0 else f"gave {code}: {child.said()[-600:]}"
    if wrong is None:
        rows = [json.loads(line) for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
        told = [line for line in child.said().splitlines() if line.startswith("warning: rewards.mine: ")]
        if any(row["reward/failed_share"] != 1 or row["reward/score_mean"] != -2 for row in rows) or len(rows) != 4:
            wrong = f"not every answer was counted, with the score of on_failure: {rows}"
        elif len(told) != 1:
            wrong = f"told {len(told)} times: {told}"
    return Fault("rewards", "rl grpo", f"the function {how.replace('_', ' ')}", "it fails in each round", wrong)


def killed_worker(trial: Trial) -> Fault:
    """kill -9 to the reward's process after every round: it is started anew, and nothing is lost."""

    def hook(child: Child) -> None:
        from dressage.rewards.functions import FunctionReward
        from dressage.training.update import Learner

        made, update, grades = [], Learner.update, FunctionReward.__call__

        def called(self: Any, rollouts: Any) -> Any:
            made.append(self)
            return grades(self, rollouts)

        def then_kill(self: Any, batches: Any) -> Any:
            os.kill(made[-1].process.pid, signal.SIGKILL)
            made[-1].process.wait()
            child.operations += 1
            return update(self, batches)

        FunctionReward.__call__ = called
        Learner.update = then_kill

    trial.afresh()
    child = start(trial.jobs["rl grpo"], trial.folder, hook)
    code = child.wait()
    wrong = None if code == 0 and child.operations == 4 else f"gave {code}: {child.said()[-600:]}"
    wrong = wrong or difference(contents(trial.folder), trial.wanted["rl grpo"])
    return Fault("rewards", "rl grpo", "its process killed after every round", "the process is killed", wrong)


def killed_while_it_hangs(trial: Trial, how: str) -> Fault:
    """kill -9 to a run whose reward hangs: the reward's process ends too, and the run can go on."""
    job = with_function(trial.jobs["rl grpo"], how)
    job = Job(job.name, [one.replace("timeout_seconds: 2,", "timeout_seconds: 600,") for one in job.arguments])
    marker = next(Path(one.split("'")[1]).parent for one in job.arguments if "mine.py" in one) / "hung"
    marker.touch()
    trial.afresh()
    start(job, trial.folder).wait()
    wanted = contents(trial.folder)

    marker.unlink()
    trial.afresh()
    child, until = start(job, trial.folder), time.monotonic() + LONGEST
    while time.monotonic() < until and not marker.exists():
        time.sleep(0.01)
    workers = _children_of(child.pid)
    child.kill()
    until = time.monotonic() + 5
    while time.monotonic() < until and any(map(_alive, workers)):
        time.sleep(0.01)
    left = [pid for pid in workers if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    wrong = f"{len(left)} of its {len(workers)} processes live on" if left or not workers else None
    if wrong is None:
        again = start(job, trial.folder)
        wrong = None if again.wait() == 0 else again.said()[-300:]
        wrong = wrong or difference(contents(trial.folder), wanted)
    what = f"the run killed while its function {how.replace('_', ' ')}"
    return Fault("rewards", "rl grpo", what, "the run is killed meanwhile", wrong)


def _children_of(pid: int) -> list[int]:
    stats = {int(path.parent.name): _stat(path) for path in Path("/proc").glob("[0-9]*/stat")}
    return [child for child, (state, parent) in stats.items() if parent == pid and state != "Z"]


def _alive(pid: int) -> bool:
    return _stat(Path(f"/proc/{pid}/stat"))[0] not in ("", "Z")


def _stat(path: Path) -> tuple[str, int]:
    """A process's state and parent; no state if it is gone."""
    try:
        state, parent = path.read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)


# --- two runs in one folder


def second_run(trial: Trial, name: str) -> Fault:
    """While one run is in the middle of its work, the same command once more, in the same folder."""

    def hook(child: Child) -> None:
        from dressage.training import trainer

        save = trainer.save_checkpoint

        def then_wait(*given: Any) -> Path:
            path = save(*given)
            if not child.operations:
                child.operations += 1
                os.kill(os.getpid(), signal.SIGSTOP)
            return path

        trainer.save_checkpoint = then_wait

    trial.afresh()
    first, until = start(trial.jobs[name], trial.folder, hook), time.monotonic() + LONGEST
    while time.monotonic() < until and (not first.operations or _stat(Path(f"/proc/{first.pid}/stat"))[0] != "T"):
        time.sleep(0.01)
    before = contents(trial.folder)
    wrong = ends_with_a_line(start(trial.jobs[name], trial.folder), "another run is working here")
    wrong = wrong or difference(contents(trial.folder), before)
    os.kill(first.pid, signal.SIGCONT)
    wrong = wrong or (None if first.wait() == 0 else f"the first gave {first.code}: {first.said()[-300:]}")
    wrong = wrong or difference(contents(trial.folder), trial.wanted[name])
    return Fault("folder", name, "the same command while it runs", "the second is refused", wrong)


def both_at_once(trial: Trial, name: str) -> Fault:
    """Two begin at the same moment: one does the work, the other is refused, or finds it done."""
    trial.afresh()
    both = [start(trial.jobs[name], trial.folder) for _ in range(2)]
    codes = sorted(child.wait() or 0 for child in both)
    wrong = None if codes in ([0, 0], [0, 2]) else f"gave {codes}: {both[0].said()[-300:]} {both[1].said()[-300:]}"
    wrong = wrong or difference(contents(trial.folder), trial.wanted[name])
    return Fault("folder", name, "the same command twice at once", "one of two", wrong)


# --- other signals


def signalled(trial: Trial, name: str, which: signal.Signals, draw: random.Random) -> Fault:
    """Ctrl-C, or what a cluster sends before it takes the machine away."""
    code: int | None = 0
    for _ in range(5):
        trial.afresh()
        child = start(trial.jobs[name], trial.folder)
        time.sleep(draw.uniform(0.2, 0.9) * trial.seconds[name])
        os.kill(child.pid, which)
        if (code := child.wait()) != 0:
            break
    promised = {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM}[which]
    wrong = None if code == promised else f"gave {code}: {child.said()[-600:]}"
    wrong = wrong or looks_whole(trial.folder, trial.wanted[name]) or resumed(trial, name)
    return Fault("signals", name, f"{which.name} {child.moment}", which.name, wrong)


# --- all of it


def some_operations(trial: Trial, name: str, points: int, draw: random.Random) -> list[int]:
    """So many of a run's file operations, spread over all of them: one at random of each equal share."""
    share = operations_of(trial, name) / points
    return sorted({1 + int((point + draw.random()) * share) for point in range(points)})


def all_faults(trial: Trial, parts: Sequence[str], kills: int, points: int, draw: random.Random) -> Iterator[Fault]:
    """Part by part."""
    for name in trial.jobs:
        yield undisturbed(trial, name)
    if "kills" in parts:
        yield from random_kills(trial, kills, draw)
    if "checkpoints" in parts:
        yield from damaged(trial, "sft")
        yield from damaged(trial, "rl ppo", DAMAGES[::6])
    if "disk" in parts:
        for name, step in {"sft": 16, "sft, all weights": 128, "rl ppo": 64, "sample": 16, "run": 128}.items():
            for kilobytes in range(step, 40 * step, step):
                fault = full_disk(trial, name, kilobytes)
                yield fault
                if fault.kind != FULL:
                    break
    if "memory" in parts:
        for name in ("sft", "dpo", "rl ppo"):
            yield out_of_memory(trial, name, "PyTorch finds no memory in the third update", no_memory_at(3))
            for megabytes in (0, 0.25, 0.5, 1, 2, 4):
                what = f"no more than {megabytes} MB beside what the first update found"
                yield out_of_memory(trial, name, what, little_memory(megabytes))
    if "rewards" in parts:
        yield from (broken_reward(trial, how) for how in BROKEN)
        yield killed_worker(trial)
        yield from (killed_while_it_hangs(trial, how) for how in ("hangs_once", "hangs_once_in_a_pattern"))
    if "folder" in parts:
        for name in ("sft", "rl grpo", "run"):
            yield second_run(trial, name)
            yield both_at_once(trial, name)
    if "operations" in parts:
        for name in trial.wanted:
            yield from (kill_at_operation(trial, name, number) for number in some_operations(trial, name, points, draw))
    if "writes" in parts:
        for name in trial.wanted:
            numbers = some_operations(trial, name, points // 2, draw)
            yield from (full_at_operation(trial, name, number) for number in numbers)
    if "signals" in parts:
        for name in trial.wanted:
            yield from (signalled(trial, name, which, draw) for which in (signal.SIGINT, signal.SIGTERM))


PARTS: Mapping[str, str] = {
    "twice": "each run made twice",
    "kills": "kill -9 at random moments",
    "operations": "kill -9 at a file operation, before it or in the middle of it",
    "signals": "Ctrl-C and SIGTERM at random moments",
    "checkpoints": "a checkpoint damaged",
    "writes": "no space left from a file operation on (the error made by us)",
    "disk": "a real disk that is full, of every size up to what the run needs",
    "memory": "no memory",
    "rewards": "a reward that fails",
    "folder": "two runs in one folder",
}


def table(faults: Sequence[Fault]) -> str:
    """By part and kind: how many, in which runs, how many not as promised."""
    lines = ["| what | of which | faults | as promised |", "|---|---|---|---|"]
    for part, told in PARTS.items():
        own = [fault for fault in faults if fault.part == part]
        for kind, count in Counter(fault.kind for fault in own).most_common():
            well = sum(fault.wrong is None for fault in own if fault.kind == kind)
            lines.append(f"| {told} | {kind} | {count} | {well} |")
    well = sum(fault.wrong is None for fault in faults)
    return "\n".join([*lines, f"| all | | {len(faults)} | {well} |"])


def load_all() -> None:
    """Once, here, for all the children: what a run loads, so that none has to."""
    import peft  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import transformers

    import dressage.cli
    import dressage.monitor.report
    import dressage.recipe
    import dressage.rollout.native
    import dressage.stages  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=60, help="at random moments (60)")
    options.add_argument("--points", type=int, default=20, help="file operations of each run to try (20)")
    options.add_argument("--only", default=",".join(PARTS), help=f"parts of {', '.join(PARTS)}")
    options.add_argument("--seed", type=int, default=1, help="of the moments")
    options.add_argument("--out", type=Path, default=Path("runs/faults"))
    given = options.parse_args()
    if unknown := set(given.only.split(",")) - set(PARTS):
        options.error(f"no such part: {', '.join(unknown)}")
    load_all()
    began, faults = time.monotonic(), list[Fault]()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = make_world(Path(scratch))
        trial = Trial(jobs, Path(scratch) / "trial" / "run")
        draw = random.Random(given.seed)
        with contextlib.suppress(KeyboardInterrupt):  # what was tried counts
            for fault in all_faults(trial, given.only.split(","), given.kills, given.points, draw):
                faults.append(fault)
                told = "as promised" if fault.wrong is None else f"NOT AS PROMISED: {fault.wrong}"
                print(f"{len(faults):4} {fault.part:11} {fault.job:16} {fault.what}: {told}", flush=True)
    seconds = time.monotonic() - began
    given.out.mkdir(parents=True, exist_ok=True)
    found = {"seed": given.seed, "seconds": round(seconds), "faults": [asdict(fault) for fault in faults]}
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(faults)}\n\n{seconds / 60:.0f} minutes")
    return 0 if all(fault.wrong is None for fault in faults) else 1


if __name__ == "__main__":
    sys.exit(main())
