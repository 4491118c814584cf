"""What a part of a reward is: something that grades answers, and may fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dressage.schema import Rollout


class Ungraded(Exception):
    """Why answers have no score, in one line: what is outside this process raised, hung or spoke nonsense."""


Grade = Callable[[Sequence[Rollout]], Sequence[object]]
"""A score for each answer, in order; in the place of one, or raised for all, Ungraded."""


@dataclass(frozen=True)
class Part:
    """A grade with its weight in the sum."""

    grade: Grade
    weight: float = 1.0
    on_failure: float = 0.0
    """What an answer scores without a finite grade, before the weight."""


def request(rollouts: Sequence[Rollout]) -> Mapping[str, list[Any]]:
    """All that a reward outside this process is told: of each answer its prompt's last turn, text, target and end."""
    return {
        "prompts": [rollout.prompt.text for rollout in rollouts],
        "answers": [rollout.text for rollout in rollouts],
        "targets": [rollout.prompt.target for rollout in rollouts],
        "finished": [rollout.completion.finish == "stop" for rollout in rollouts],
    }
