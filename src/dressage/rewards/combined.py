"""Rollouts to rewards by a weighted sum of named parts; what fails is counted and told, never dropped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dressage.rewards.parts import Part, Ungraded
from dressage.schema import Reward, Rollout

LARGEST = 1e15
"""Beyond, a score's square leaves float32, and it is no number to learn from."""


@dataclass(frozen=True)
class CombinedReward:
    """sum_i weight_i * part_i; an answer that a part cannot grade scores that part's `on_failure`."""

    parts: Mapping[str, Part]
    told: set[str] = field(default_factory=set)
    """Parts whose first failure has been told."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        """The weighted sum, its parts, and which of them failed."""
        columns = {name: self._column(name, part, rollouts) for name, part in self.parts.items()}
        rewards = []
        for row in range(len(rollouts)):
            found = {name: column[row] for name, column in columns.items()}
            scores = {name: self.parts[name].on_failure if one is None else one for name, one in found.items()}
            total = sum(self.parts[name].weight * score for name, score in scores.items())
            rewards.append(Reward(total, scores, tuple(name for name, one in found.items() if one is None)))
        return rewards

    def _column(self, name: str, part: Part, rollouts: Sequence[Rollout]) -> list[float | None]:
        try:
            grades = part.grade(rollouts)
        except Ungraded as why:
            grades = [why] * len(rollouts)
        if len(grades) != len(rollouts):
            grades = [Ungraded(f"{len(grades)} scores for {len(rollouts)} answers")] * len(rollouts)
        scores = [finite(grade) for grade in grades]
        if None in scores and name not in self.told:
            self.told.add(name)
            first = grades[scores.index(None)]
            fault = str(first) if isinstance(first, Ungraded) else f"gave {first!r:.80}, which is no finite number"
            warnings.warn(
                f"rewards.{name}: {fault}; {scores.count(None)} of {len(scores)} answers score {part.on_failure:g}"
                " there instead (told once; reward/failed_share counts on)",
                stacklevel=2,
            )
        return scores


def finite(grade: object) -> float | None:
    """The grade as a number to learn from, or none."""
    if not isinstance(grade, int | float):
        return None
    return float(grade) if abs(grade) <= LARGEST and math.isfinite(grade) else None
