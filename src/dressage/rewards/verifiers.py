"""Verdicts on an answer by rule alone: 1 or 0. Nothing that a model writes is evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

from dressage.schema import Rollout

MARK = "####"
"""What stands before the final answer in GSM8K."""
LONGEST = 4000
"""Characters at an answer's end among which its last number is looked for; Python reads no longer whole numbers."""
LONGEST_SEARCHED = 10_000
"""Characters at an answer's beginning in which a pattern is looked for."""

# Full-width digits as Chinese texts have them, and the minus that is not a hyphen.
_PLAIN = str.maketrans("０１２３４５６７８９．，／−－", "0123456789.,/--")
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
# A minus after a letter, digit or bracket is a hyphen or a subtraction; between sign and digits may stand a currency.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}.])[-+](?=[$€£¥]?[\d.\\]))?[$€£¥]?\s?"
    rf"(?:\\[dt]?frac\{{(?P<over>-?\d+)\}}\{{(?P<under>\d+)\}}"
    rf"|(?P<whole>{_WHOLE})(?:\s?/\s?(?P<parts>\d+)|(?P<decimals>\.\d+))?"
    rf"|(?P<point>(?<![\d.])\.\d+))",
    re.ASCII,
)


def final(text: str) -> str:
    """What stands after the last "####", or the whole text."""
    return text.rpartition(MARK)[2]


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly: 72, -1,200.50, $3, 3/4, .5, \\frac{1}{2}; none if there is none."""
    numbers = list(_NUMBER.finditer(text[-LONGEST:].translate(_PLAIN)))
    if not numbers:
        return None
    found = numbers[-1]
    whole = (found["whole"] or "").replace(",", "")
    over = Fraction(found["over"] or whole + (found["decimals"] or found["point"] or ""))
    under = int(found["under"] or found["parts"] or 1)
    return None if under == 0 else over / under * (-1 if found["sign"] == "-" else 1)


def number(answer: str, target: str) -> bool:
    """Is the answer's last number the target's? Both are read after "####" where it stands."""
    wanted = last_number(final(target))
    return wanted is not None and last_number(final(answer)) == wanted


def exact(answer: str, target: str) -> bool:
    """Is the answer the target, but for case and white space? Both are read after "####" where it stands."""
    return _plain(final(answer)) == _plain(final(target))


def length(answer: str, low: int, high: int, unit: Literal["words", "characters"]) -> bool:
    """Has the answer between low and high words or characters, both included?"""
    return low <= (len(answer.split()) if unit == "words" else len(answer.strip())) <= high


def pattern(*, answers: Sequence[str], pattern: str, **_: Any) -> list[float]:
    """Is the expression found in each answer? Called as a reward function is, where it can be ended: it may hang."""
    expression = re.compile(pattern, re.MULTILINE)
    return [float(expression.search(answer[:LONGEST_SEARCHED]) is not None) for answer in answers]


def against_targets(check: Callable[[str, str], bool], rollouts: Sequence[Rollout]) -> list[float]:
    """1 where the answer stands the check against its prompt's target."""
    return [float(check(one.text, one.prompt.target)) if one.prompt.target else 0.0 for one in rollouts]


def within_length(
    low: int, high: int, unit: Literal["words", "characters"], rollouts: Sequence[Rollout]
) -> list[float]:
    """1 where the answer's length is in the range."""
    return [float(length(one.text, low, high, unit)) for one in rollouts]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
