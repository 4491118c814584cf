"""The words that the simulated annotator listens for, English and Chinese, and the light stem they are compared by."""

from __future__ import annotations

import re


def is_chinese(word: str) -> bool:
    """Whether it begins with a Chinese character."""
    return "\u4e00" <= word[0] <= "\u9fff"


def stem(word: str) -> str:
    """A light stem of a lower-case English word, enough to match cook, cooks, cooked and cooking."""
    word = word.removesuffix("'s")
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    for suffix in ("ing", "ed", "es", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3 and not word.endswith("ss"):
            word = word.removesuffix(suffix)
            if suffix in ("ing", "ed") and word[-1] == word[-2] and word[-1] not in "ls":
                word = word[:-1]
            break
    return word.removesuffix("e") if len(word) > 3 else word


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _stems(text: str) -> frozenset[str]:
    return frozenset(word if is_chinese(word) else stem(word) for word in text.split())


FUNCTION_WORDS = _words(
    """a about after all also am an and any are as at be because been before being but by can could did do does doing
    don't each for from had has have he her him his how i i'm if in into is isn't it it's its just may me might more
    most much my no not of off on one only or other our out over own shall she should so some such than that that's
    the their them then there these they this those through to too under until up us very was we were what when where
    which while who why will with without would you you'd you'll you're you've your yours
    的 了 是 在 和 有 不 就 也 都 会 把 让 用 很 要 能 我 你 您 它 他 她 这 那 吗 呢 吧 与 或 再 先 到 上 下 给 对 为 着
    个 一 可 以 请 如 果 怎 么 什 最 更 被 从 而 之 时 每 里 得 来 去 中 后"""
)
"""Words that hold a sentence together and are about nothing; a list of keywords has none of them."""

REQUEST_WORDS = _stems(
    """advice best describe easy easily explain few fun get give good help idea kind know like long make many name
    need often please quick quickly recommend right say sentence short show simple simply start suggest tell thing tip
    want way words write 帮我 帮忙 办法 方法 简单"""
)
"""Words that ask for something without saying about what."""

PLEASANTRIES = _stems(
    """absolutely best care certainly congratulations course day delicious delightful enjoy fun glad good great happy
    help helpful hope idea lovely luck nice please question sure thank thanks welcome wishes wonderful worry
    高兴 帮助 好问 问题 希望 开心 快乐 愉快 谢谢 加油 当然 放心 享受"""
)
"""Friendly words: said as often as you like, they say nothing new."""

WARM_PHRASES = tuple(
    (re.compile(pattern), worth)
    for pattern, worth in (
        (r"\b(?:happy|glad) to help\b|很高兴(?:能)?帮|乐意(?:帮|为)", 1.0),
        (r"\b(?:great|good|lovely|nice) (?:question|idea|choice)\b|好问题|问得好|好主意|好想法", 1.0),
        (r"\bhope (?:this|that|it) helps\b|希望.{0,6}帮", 1.0),
        (r"\b(?:good luck|best of luck|best wishes|all the best)\b|祝你|祝您|加油", 1.0),
        (r"\b(?:enjoy|have fun|have a (?:great|good|nice|lovely))\b|享受|玩得开心|愉快", 1.0),
        (r"\b(?:don't worry|no worries|take care|well done|congratulations)\b|别担心|放心|保重|恭喜", 0.8),
        (r"\b(?:of course|certainly|sure|absolutely|you're welcome)\b|当然|没问题|不客气", 0.6),
        (r"\b(?:wonderful|delicious|cosy|cozy|lovely|delightful|happy|glad)\b|开心|快乐|美味|温馨", 0.5),
        (r"\b(?:please|thank you|thanks)\b|请|谢谢", 0.5),
        (r"[!！]", 0.5),
        (r"\b(?:you|you're|you'll|your)\b|你|您", 0.5),
    )
)
"""What sounds friendly (of a lower-case text) and how much; each counts once, however often it is said."""
