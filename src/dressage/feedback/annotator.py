"""A *simulated* annotator for the quickstart and for tests: a hidden preference and honest noise, no person involved.

The preference is "brief, finished, friendly, on the subject". It is known in closed form, so a run can be checked
against what the reward model was never shown. It judges words, not truth: never use it to claim that answers are good.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dressage.errors import ConfigError, DataError
from dressage.feedback.vocabulary import FUNCTION_WORDS, PLEASANTRIES, REQUEST_WORDS, WARM_PHRASES, is_chinese, stem

_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+(?:'[^\W_\u4e00-\u9fff]+)*")
_ENDING = re.compile(r"[.!?。！？][\"'”’」)）\]]*$")
_CHINESE_WORD = 0.6
"""Words that one Chinese character is worth."""


@dataclass(frozen=True)
class Preference:
    """The hidden preference: what each quality (0 to 1) is worth above `lowest`, and where brevity is best."""

    lowest: float = -2.0
    """Score of an empty answer; with the weights below the best possible score is +2."""
    brevity: float = 1.6
    finished: float = 1.4
    friendly: float = 0.8
    """Room that plain demonstrations leave: an answer can be brief and finished and still say nothing kind."""
    subject: float = 0.2
    shortest_words: float = 6.0
    longest_words: float = 14.0
    """Between these two lengths brevity is 1."""
    off_subject_loss: float = 0.1
    """Share of all credit that an answer loses when it takes up nothing of the prompt."""


@dataclass(frozen=True)
class GoldScore:
    """What the hidden preference thinks of an answer.

    `total` lies in [-2, 2] with the default weights. `parts` are qualities from 0 to 1: brevity, finished, friendly,
    subject, and sense (1 reads as a text; 0 is repetition, an echo of the prompt, or a heap of keywords).
    """

    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class _Text:
    """A text as the preference sees it."""

    words: tuple[str, ...]  # words and single Chinese characters, in order
    content: tuple[str, ...]  # what it is about: stems, and pairs of neighbouring Chinese characters
    length: float  # in words

    @classmethod
    def of(cls, text: str) -> _Text:
        words = tuple(_WORD.findall(text.lower().replace("’", "'")))
        content = [stem(word) for word in words if not is_chinese(word) and word not in FUNCTION_WORDS]
        for first, second in re.findall(r"(?=([\u4e00-\u9fff])([\u4e00-\u9fff]))", text):
            if first not in FUNCTION_WORDS and second not in FUNCTION_WORDS:
                content.append(first + second)
        return cls(words, tuple(content), sum(_CHINESE_WORD if is_chinese(word) else 1.0 for word in words))


def gold_score(prompt: str, answer: str, finished: bool, preference: Preference = Preference()) -> GoldScore:
    """The hidden preference's opinion of one answer, without noise.

    total = lowest + credit * (the weighted sum of brevity, finished, friendly and subject), where credit = sense *
    (1 - off_subject_loss * (1 - subject)). The factor, unlike one more term, leaves nothing to be had for pleasantries
    about nothing or for a pile of the right words. `finished` says whether the policy ended the answer itself.
    """
    asked, said = _Text.of(prompt), _Text.of(answer)
    if not said.words:
        return GoldScore(preference.lowest, dict.fromkeys(("brevity", "finished", "friendly", "subject", "sense"), 0.0))
    parts = {
        "brevity": _brevity(said.length, preference),
        "finished": _finished(answer, finished),
        "friendly": _friendly(answer),
        "subject": _subject(asked, said),
        "sense": _sense(asked, said),
    }
    wanted = sum(getattr(preference, name) * parts[name] for name in ("brevity", "finished", "friendly", "subject"))
    credit = parts["sense"] * (1 - preference.off_subject_loss * (1 - parts["subject"]))
    return GoldScore(preference.lowest + credit * wanted, parts)


class SimulatedAnnotator:
    """Ranks answers as a person with the hidden preference would who is not always sure.

    `noise` is the scale of the doubt in units of the gold score: of two answers the better is put first with
    probability sigmoid(difference / noise) (Bradley and Terry 1952); several follow Plackett-Luce. With the default
    two answers a half apart are told apart nearly always, near equals hardly ever. With 0 the order is that of the
    gold scores.
    """

    name = "simulated: brief-friendly"

    def __init__(self, seed: int, noise: float = 0.12, preference: Preference = Preference()) -> None:
        if noise < 0:
            raise ConfigError(f"the annotator's noise is {noise}; it must be at least 0")
        self.seed = seed
        self.noise = noise
        self.preference = preference

    def rank(self, prompt: str, answers: Sequence[str], finished: Sequence[bool]) -> tuple[int, ...]:
        """A rank for each answer, 0 the best; equal answers tie.

        The doubt about an answer depends on (seed, prompt, answer) alone, so the order of the answers plays no part.
        """
        if len(answers) != len(finished):
            raise DataError(f"{len(answers)} answers but {len(finished)} marks of whether they are finished")
        liking = [self._liking(prompt, answer, end) for answer, end in zip(answers, finished, strict=True)]
        best_first = sorted(set(liking), reverse=True)
        return tuple(best_first.index(value) for value in liking)

    def _liking(self, prompt: str, answer: str, finished: bool) -> float:
        """Gold score plus Gumbel noise: the largest of such sums is drawn by softmax(score / noise)."""
        gold = gold_score(prompt, answer, finished, self.preference).total
        return gold + self.noise * _gumbel(self.seed, prompt, answer)


def _gumbel(seed: int, prompt: str, answer: str) -> float:
    """A standard Gumbel number that depends on nothing but its arguments, the same on every machine."""
    digest = hashlib.sha256(json.dumps([seed, prompt, answer]).encode()).digest()
    # 52 bits and a half: never 0 or 1, where the logarithms end.
    uniform = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
    return -math.log(-math.log(uniform))


def _brevity(words: float, preference: Preference) -> float:
    """1 between the two lengths; a half at 4 words too few or 8 too many, and never flat, so there is always a way."""
    too_few = max(0.0, preference.shortest_words - words) / 4
    too_many = max(0.0, words - preference.longest_words) / 8
    return 1 / (1 + too_few**2 + too_many**2)


def _finished(answer: str, finished: bool) -> float:
    """Most of it for ending by itself, the rest for a sentence's end; a lucky cut after a full stop earns little."""
    punctuated = _ENDING.search(answer.rstrip()) is not None
    return {(True, True): 1.0, (True, False): 0.5, (False, True): 0.2, (False, False): 0.0}[finished, punctuated]


def _friendly(answer: str) -> float:
    """Saturates: two or three friendly turns are as good as ten."""
    text = answer.lower().replace("’", "'")
    return 1 - math.exp(-1.2 * sum(worth for pattern, worth in WARM_PHRASES if pattern.search(text)))


def _subject(asked: _Text, said: _Text) -> float:
    """How much of what the prompt is about the answer takes up; half of it is nearly enough."""
    wanted = set(asked.content) - REQUEST_WORDS
    if not wanted:
        return 1.0
    return 1 - (1 - len(wanted & set(said.content)) / len(wanted)) ** 3


def _sense(asked: _Text, said: _Text) -> float:
    """1 for a text; towards 0 for repetition, an echo, words without grammar, or nothing said beyond the prompt."""
    triples, asked_triples = _runs(said.words, 3), set(_runs(asked.words, 3))
    echoed = sum(triple in asked_triples for triple in triples) / max(1, len(triples))
    function_words = sum(word in FUNCTION_WORDS for word in said.words) / len(said.words)
    usual = sum(0.14 if is_chinese(word) else 0.24 for word in said.words) / len(said.words)
    new = set(said.content) - set(asked.content) - PLEASANTRIES
    return (
        (1 - _ramp(_repeated(said.content), 0.3, 0.7))
        * (1 - _ramp(_repeated(triples), 0.05, 0.35))
        * (1 - _ramp(echoed, 0.25, 0.75))
        * _ramp(function_words / usual, 0.3, 1.0)
        * _ramp(len(new), 0, 2)
    )


def _repeated(items: Sequence[object]) -> float:
    """Share of the items that were there before."""
    return 1 - len(set(items)) / len(items) if items else 0.0


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """Every run of so many neighbouring words."""
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high`, smooth between (3t^2 - 2t^3)."""
    t = min(1.0, max(0.0, (value - low) / (high - low)))
    return t * t * (3 - 2 * t)
