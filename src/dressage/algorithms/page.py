"""The catalog as a page to read: docs/algorithms.md, and what `dressage algorithms NAME` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from dressage.algorithms.catalog import ALGORITHMS, Algorithm

INTRODUCTION = """# The algorithms

Made from [`algorithms/catalog.py`](../src/dressage/algorithms/catalog.py) by `make docs`; change it there. Each is one
row of that table and has a recipe. How each is proven, and what was found where the answer is known, is in
[numerics.md](numerics.md).

In the formulas p is the policy being trained, q the reference it started from, r the ratio of a token's probability now
to that when it was sampled, A the advantage of a token: how much better it turned out than expected. A setting is
changed by `settings.NAME=VALUE`.
"""
FAMILIES = {
    "Learning from demonstrations and rankings": "`dressage sft`, `dressage reward`",
    "Straight from preferences": "`dressage dpo NAME`: no reward model, no sampling",
    "From the policy's own answers": "`dressage rl NAME`: sample, score, learn, again",
}


def family(row: Algorithm) -> str:
    """The heading under which a row stands."""
    records, preferences, answers = FAMILIES
    if "reward" in row.roles or row.advantage is not None:
        return answers
    return records if row.implicit_reward is None else preferences


def needs(row: Algorithm) -> str:
    """What must be at hand beside the model that learns."""
    said = [{"reward": "a reward", "value": "a critic", "reference": "a reference"}[role] for role in sorted(row.roles)]
    if row.fewest_answers > 1:
        said.append(f"{row.fewest_answers} answers a prompt or more")
    if row.greedy_baseline:
        said.append("a greedy answer to each prompt")
    return ", ".join(said) or "nothing"


def defaults(row: Algorithm) -> Mapping[str, object]:
    """The settings that are in force without being asked for."""
    told = {field.name: getattr(row.settings, field.name) for field in fields(row.settings)}
    return {name: value for name, value in told.items() if value not in (None, False, 0)}


def describe(row: Algorithm) -> list[str]:
    """A row in a few lines: what it minimises, needs, is set to, and is for."""
    set_to = ", ".join(f"{key}={value:g}" if value is not True else key for key, value in defaults(row).items())
    return [
        f"{row.about.title} ({row.about.paper})",
        f"minimises: {row.about.loss}",
        f"needs: {needs(row)}",
        f"settings: {set_to or 'none in force'}",
        row.about.use,
    ]


def page() -> str:
    """docs/algorithms.md."""
    parts = [INTRODUCTION]
    for heading, how in FAMILIES.items():
        rows = {name: row for name, row in ALGORITHMS.items() if family(row) == heading}
        parts.append(f"## {heading}\n\n{how}\n\n| row | what it is | needs | paper |\n|---|---|---|---|")
        parts += [
            f"| [`{name}`](#{name}) | {row.about.title} | {needs(row)} | {row.about.paper} |"
            for name, row in rows.items()
        ]
        for name, row in rows.items():
            _, loss, _, settings, use = describe(row)
            told = f"    {loss.removeprefix('minimises: ')}\n\nSettings: {settings.removeprefix('settings: ')}."
            parts.append(f"\n### {name}\n\n{use}\n\n{told}")
        parts.append("")
    return "\n".join(parts)
