"""What can be known of a reward before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dressage.errors import ConfigError, DataError
from dressage.rewards.combined import finite
from dressage.rewards.functions import FunctionReward
from dressage.rewards.parts import Grade, Ungraded
from dressage.rewards.verifiers import final, last_number
from dressage.schema import Completion, Prompt, Rollout

MADE_UP = ("2 + 3 = 5, so the answer is 5.\n#### 5", "")
"""Answers to the first two prompts; an empty one will come."""


def check_targets(
    what: str, kind: Literal["number", "exact"], prompts: Sequence[Prompt], sources: Sequence[str]
) -> None:
    """DataError if a prompt has no target, or none with a number where one is asked for."""
    bare = [prompt for prompt in prompts if not prompt.target]
    if bare:
        raise DataError(
            f"{', '.join(sources)}: {len(bare)} of {len(prompts)} prompts have no target, with which {what} compares;"
            " give rows with target, answer or solution (as GSM8K has), or leave out that part"
        )
    if kind == "number":
        wordy = [prompt.target for prompt in prompts if prompt.target and last_number(final(prompt.target)) is None]
        if wordy:
            raise DataError(
                f"{', '.join(sources)}: {len(wordy)} of {len(prompts)} targets hold no number ({wordy[0]!r:.60}), with"
                f" which {what} compares; use type exact, or leave those rows out"
            )


def try_out(what: str, grade: Grade, prompts: Sequence[Prompt]) -> None:
    """ConfigError unless it gives the first two prompts' made-up answers a finite number each."""
    rollouts = [
        Rollout(prompt, Completion((), (), "stop"), answer, number)
        for number, (prompt, answer) in enumerate(zip(prompts, MADE_UP, strict=False))
    ]
    try:
        grades = list(grade(rollouts))
        if len(grades) != len(rollouts):
            raise Ungraded(f"gave {len(grades)} scores for {len(rollouts)} answers")
        for one in grades:
            if isinstance(one, Ungraded):
                raise one
            if finite(one) is None:
                raise Ungraded(f"gave {one!r:.80}, which is no finite number")
    except Ungraded as why:
        raise ConfigError(f"{what}: tried on two made-up answers: {why}; mend it and give the command again") from why
    finally:
        if isinstance(grade, FunctionReward):
            grade.close()
