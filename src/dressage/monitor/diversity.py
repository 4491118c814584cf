"""How varied answers are, in words: the simplest sign that a policy has collapsed onto one phrase. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Chinese and Japanese write no spaces: each character counts as a word.
_CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CHARACTER}]|[^\W{_CHARACTER}]+(?:['’][^\W{_CHARACTER}]+)*")


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation; a Chinese or Japanese character is a word."""
    return _WORD.findall(text.lower())


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    tokens = words(text)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: Iterable[str], n: int = 2) -> float:
    """Share of different n-grams of words among all n-grams of all texts; 1: no phrase occurs twice, 0: there is none.

    distinct-n of Li et al. (2016, "A Diversity-Promoting Objective Function for Neural Conversation Models"), who
    divide by the words; by the n-grams it can reach 1 for short answers too. It falls as text is added, so compare only
    models that answered the same number of prompts, and mind a change of length.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that it has said before; 0: none, near 1: stuck (seq-rep-n, Welleck et al. 2020)."""
    ngrams = _ngrams(text, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
