"""Sampling of which nothing is lost: completions are kept part by part, and only what is missing is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dressage.monitor.writers import write_whole
from dressage.rollout.engine import Engine
from dressage.schema import Completion, Prompt, Sampling


@dataclass(frozen=True)
class Kept:
    """A file of completions by their numbers: a line for each part, with a hash of it and of what it belongs to."""

    path: Path
    identity: str
    """Of the settings and prompts: what was sampled with others is none of ours."""

    def read(self) -> dict[int, Completion]:
        """What is whole and ours; lines that are not are told, and forgotten."""
        if not self.path.is_file():
            return {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        own = [(line, part) for line in lines if (part := self._part(line)) is not None]
        if len(own) < len(lines):
            warnings.warn(
                f"{self.path}: {len(lines) - len(own)} of {len(lines)} lines are cut, damaged or of another run;"
                " their answers are sampled again",
                stacklevel=3,
            )
            write_whole(self.path, "".join(f"{line}\n" for line, _ in own))
        return {number: completion for _, part in own for number, completion in part.items()}

    def add(self, part: Mapping[int, Completion]) -> None:
        """One more part, on the disk before this returns."""
        rows = {str(number): asdict(completion) for number, completion in part.items()}
        line = json.dumps({"sha256": self._hash(rows), "completions": rows})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())

    def _part(self, line: str) -> dict[int, Completion] | None:
        try:
            read = json.loads(line)
            rows = read["completions"]
            if read["sha256"] != self._hash(rows):
                return None
        except (ValueError, KeyError, TypeError):
            return None
        return {
            int(number): Completion(tuple(row["tokens"]), tuple(row["logprobs"]), row["finish"], row["version"])
            for number, row in rows.items()
        }

    def _hash(self, rows: Mapping[str, Any]) -> str:
        return hashlib.sha256((self.identity + json.dumps(rows, sort_keys=True)).encode()).hexdigest()


def identity_of(settings_hash: str, asked: Sequence[Prompt]) -> str:
    """The same only for the same settings and the same prompts in the same order."""
    digest = hashlib.sha256(settings_hash.encode())
    for prompt in asked:
        digest.update(repr(prompt.tokens).encode())
    return digest.hexdigest()


def completed(
    engine: Engine,
    asked: Sequence[Prompt],
    sampling: Sampling,
    most: int,
    kept: Kept,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """One completion for each prompt, in order, `most` or so at a time; those that `kept` holds are not asked for."""
    found = kept.read()
    for part in parts(asked, most):
        if not all(i in found for i in part):
            made = engine.generate([asked[i] for i in part], sampling, lambda done: progress(len(found) + done))
            new = dict(zip(part, made, strict=True))
            kept.add(new)
            found.update(new)
        progress(len(found))
    return [found[i] for i in range(len(asked))]


def parts(asked: Sequence[Prompt], most: int) -> Iterator[list[int]]:
    """Numbers of the prompts to be answered together, the longest first.

    Equal prompts stay together, since an answer's draw depends on how many equal prompts stand before it; so a part may
    be larger than `most`, if one prompt is asked that often.
    """
    equal: dict[str, list[int]] = {}
    for number, prompt in enumerate(asked):
        equal.setdefault(prompt.id, []).append(number)
    part: list[int] = []
    for numbers in sorted(equal.values(), key=lambda own: (-len(asked[own[0]].tokens), asked[own[0]].tokens)):
        if part and len(part) + len(numbers) > most:
            yield part
            part = []
        part = [*part, *numbers]
    if part:
        yield part
