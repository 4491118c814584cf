"""answers.jsonl and rankings.jsonl, written and read, and what is known of an answer beside its score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dressage.data.parsers import own_answers
from dressage.data.template import ChatTemplate
from dressage.data.values import BadRow
from dressage.errors import DataError
from dressage.feedback.annotator import gold_score
from dressage.monitor.writers import write_whole
from dressage.pipeline import NOTES, write_json
from dressage.schema import Completion, Prompt, Rollout

ANSWERS, RANKINGS = "answers.jsonl", "rankings.jsonl"


def read_answers(path: Path, template: ChatTemplate) -> list[Rollout]:
    """The first answer to each prompt of an answers.jsonl, written with this template."""
    rollouts = []
    for group, (_, row) in enumerate(lines_of(path)):
        prompt, answer = template.encode_prompt(prompt_of(row)), row["answers"][0]
        finished = answer["finish"] == "stop"
        tokens = template.encode_answer(prompt, answer["text"], finished).tokens[len(prompt.tokens) :]
        rollouts.append(
            Rollout(prompt, Completion(tokens, (0.0,) * len(tokens), answer["finish"]), answer["text"], group)
        )
    if not rollouts:
        raise DataError(f"{path}: holds no answers")
    return rollouts


def lines_of(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows of an answers.jsonl with their line numbers; DataError at the first that is none."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line.decode())
                    own_answers(row)
                except (ValueError, RecursionError, BadRow) as error:
                    why = f" ({error})" if isinstance(error, BadRow) else ""
                    raise DataError(
                        f"{path}:{number}: not a line of answers.jsonl{why}; make the file with `dressage sample`"
                    ) from error
                yield number, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it with `dressage sample`") from error


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """What a row answers, not yet encoded."""
    return own_answers(row)[0]


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as rows hold it."""
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file that appears whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def gold_of(rollout: Rollout) -> float:
    """The hidden preference of the simulated annotator."""
    return gold_score(rollout.prompt.text, rollout.text, rollout.completion.finish == "stop").total


def note(folder: Path, notes: Sequence[str], console: Console | None) -> None:
    """What was read, left out and why: on the screen and in data.json."""
    write_json(folder / NOTES, {"notes": list(notes)})
    if console:
        for one in notes:
            console.print(f"  {one}", highlight=False, soft_wrap=True)
