"""Records -> tokens of bounded length, and the split into what is learned and what is held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from dressage.data.sources import Dropped, reasons
from dressage.data.template import ChatTemplate, Encoded
from dressage.errors import DataError
from dressage.schema import Demonstration, Message, Prompt, Ranking, Rating

OnTooLong = Literal["error", "drop", "cut"]
Kept = TypeVar("Kept")
Record = TypeVar("Record", Demonstration, Ranking, Rating, Prompt)


@dataclass(frozen=True)
class EncodedRanking:
    """The K answers to one prompt, each after that prompt, and their ranks: 0 is best, equal ranks are a tie."""

    answers: tuple[Encoded, ...]
    ranks: tuple[int, ...]
    grades: tuple[float, ...] = ()
    """How good each was found, higher is better; empty: not said."""
    ref_answer_logprobs: tuple[float, ...] = ()
    """Of the reference, for each answer as a whole; empty: not asked."""


@dataclass(frozen=True)
class EncodedRating:
    """An answer after its prompt, judged by itself, and another prompt's answer after the same prompt."""

    answers: tuple[Encoded, ...]
    """The one that was judged, and the unrelated one, from which only the KL is estimated."""
    good: bool
    ref_answer_logprobs: tuple[float, ...] = ()
    """Of the reference, for each answer as a whole; empty: not asked."""


@dataclass(frozen=True)
class Prepared(Generic[Kept]):
    """What is fit to train on, in the order given, and what was left out or cut."""

    rows: tuple[Kept, ...]
    indices: tuple[int, ...]
    """Which record each row was made of."""
    dropped: tuple[Dropped, ...]
    cut: int
    """Rows of which an answer lost its end."""

    def summary(self) -> str:
        """A line for people: how many rows there are, how many were cut or left out and why."""
        cut = f", {self.cut} cut" if self.cut else ""
        return f"{len(self.rows)} rows{cut}" + reasons(self.dropped)


class _TooLong(Exception):
    """A record that does not fit; the reason is the same for all of a kind."""


def prepare_demonstrations(
    records: Sequence[Demonstration], template: ChatTemplate, *, max_tokens: int, on_too_long: OnTooLong = "drop"
) -> Prepared[Encoded]:
    """Demonstrations of at most `max_tokens`; "cut" takes the end off the last answer, which then has no end mark.

    Raises: DataError under "error", naming the record that is too long.
    """

    def prepare(record: Demonstration) -> tuple[Encoded, bool]:
        return _fitted(template.encode_demonstration(record), max_tokens, on_too_long)

    return _prepared(records, prepare, on_too_long, max_tokens)


def prepare_rankings(
    records: Sequence[Ranking], template: ChatTemplate, *, max_tokens: int, on_too_long: OnTooLong = "drop"
) -> Prepared[EncodedRanking]:
    """Rankings of which every answer, with its prompt, has at most `max_tokens`; one that has not goes as a whole.

    Raises: DataError under "error", naming the record that is too long.
    """

    def prepare(record: Ranking) -> tuple[EncodedRanking, bool]:
        finished = record.finished or (True,) * len(record.answers)
        whole = template.encode_answers(record.prompt, zip(record.answers, finished, strict=True))
        fitted = [_fitted(answer, max_tokens, on_too_long) for answer in whole]
        answers, cut = tuple(answer for answer, _ in fitted), any(cut for _, cut in fitted)
        if cut and len(set(answers)) == 1:
            raise _TooLong("answers the same once cut")
        return EncodedRanking(answers, record.ranks, record.grades), cut

    return _prepared(records, prepare, on_too_long, max_tokens)


def prepare_ratings(
    records: Sequence[Rating], template: ChatTemplate, *, max_tokens: int, on_too_long: OnTooLong = "drop"
) -> Prepared[EncodedRating]:
    """Ratings of at most `max_tokens`, each with an unrelated answer of the same set.

    Raises: DataError under "error", naming the record that is too long.
    """

    def prepare(record: Rating) -> tuple[EncodedRating, bool]:
        whole = template.encode_answer(record.prompt, record.answer, record.finished)
        answer, cut = _fitted(whole, max_tokens, on_too_long)
        return EncodedRating((answer,), record.good), cut

    prepared = _prepared(records, prepare, on_too_long, max_tokens)
    unrelated = mismatched([row.answers[0] for row in prepared.rows], max_tokens)
    rows = (replace(row, answers=(*row.answers, o)) for row, o in zip(prepared.rows, unrelated, strict=True))
    return replace(prepared, rows=tuple(rows))


def mismatched(rows: Sequence[Encoded], max_tokens: int) -> list[Encoded]:
    """For each row its prompt with the answer of another prompt, if need be cut; every answer is used once.

    In the order of their prompts, a row takes the answer that stands as far on as the most rows of one prompt reach:
    that is another prompt's, unless one prompt has more than half of all rows.
    """
    starts = [len(row.tokens) - sum(row.loss_mask) for row in rows]
    prompts = [row.tokens[:start] for row, start in zip(rows, starts, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: prompts[i])
    shift = max(Counter(prompts).values(), default=0)
    found = list(rows)
    for place, i in enumerate(order):
        j = order[(place + shift) % len(rows)]
        tokens = (prompts[i] + rows[j].tokens[starts[j] :])[:max_tokens]
        found[i] = Encoded(tokens, (False,) * starts[i] + (True,) * (len(tokens) - starts[i]))
    return found


def prepare_prompts(
    records: Sequence[Prompt], template: ChatTemplate, *, max_tokens: int, on_too_long: OnTooLong = "drop"
) -> Prepared[Prompt]:
    """Prompts with their tokens, at most `max_tokens`; a prompt is never cut, so "cut" leaves long ones out.

    Raises: DataError under "error", naming the prompt that is too long.
    """

    def prepare(record: Prompt) -> tuple[Prompt, bool]:
        prompt = template.encode_prompt(record)
        if len(prompt.tokens) > max_tokens:
            raise _TooLong("prompt too long")
        return prompt, False

    return _prepared(records, prepare, on_too_long, max_tokens)


def split(
    records: Sequence[Record], *, fraction: float | None = None, count: int | None = None, seed: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Records to train on and records held out; those that open with the same user's words stay together.

    Where a record falls depends on its opening and the seed alone. With `fraction` a record therefore stays on its side
    when the file grows, and falls on the same side in the next stage; with `count` it is the first openings in the
    order of their hashes, as many as fit, and exactly `count` records unless single ones run out.
    """
    if (fraction is None) == (count is None):
        raise ValueError("give fraction or count, one of them")
    keys = [_opening(record) for record in records]
    # A number in [0, 1) for each opening, the same on every machine.
    chance = {key: int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()[:13], 16) / 16**13 for key in set(keys)}
    if fraction is not None:
        if not 0 <= fraction < 1:
            raise DataError(f"a held-out fraction of {fraction} is not in [0, 1)")
        held_out = {key for key, drawn in chance.items() if drawn < fraction}
    else:
        held_out = _first_openings(keys, chance, count or 0)
    training = tuple(record for record, key in zip(records, keys, strict=True) if key not in held_out)
    return training, tuple(record for record, key in zip(records, keys, strict=True) if key in held_out)


def _first_openings(keys: Sequence[str], chance: dict[str, float], count: int) -> set[str]:
    if not 0 <= count < max(len(keys), 1):
        raise DataError(f"cannot hold out {count} of {len(keys)} records; hold out fewer")
    sizes = {key: 0 for key in keys}
    for key in keys:
        sizes[key] += 1
    held_out: set[str] = set()
    for key in sorted(sizes, key=lambda key: (chance[key], key)):
        if sizes[key] <= count:
            held_out.add(key)
            count -= sizes[key]
    return held_out


def _opening(record: Demonstration | Ranking | Rating | Prompt) -> str:
    """The id of the first user's turn by itself, so that longer and shorter talks of one beginning are one."""
    messages = record.prompt.messages if isinstance(record, Ranking | Rating) else record.messages
    first = next((message.content for message in messages if message.role == "user"), "")
    return Prompt.of(first.strip()).id


def _fitted(whole: Encoded, max_tokens: int, on_too_long: OnTooLong) -> tuple[Encoded, bool]:
    """The row, or its beginning and whether it was cut; nothing may go of what stands before the last answer."""
    if len(whole.tokens) <= max_tokens:
        return whole, False
    # All beyond the limit, and at least one token before it, must be of the last answer.
    if not all(whole.loss_mask[max_tokens - 1 :]):
        raise _TooLong("prompt too long")
    if on_too_long != "cut":
        raise _TooLong("answer too long")
    return Encoded(whole.tokens[:max_tokens], whole.loss_mask[:max_tokens]), True


def _prepared(
    records: Sequence[Record], prepare: Callable[[Record], tuple[Kept, bool]], on_too_long: OnTooLong, max_tokens: int
) -> Prepared[Kept]:
    rows: list[Kept] = []
    indices: list[int] = []
    dropped: list[Dropped] = []
    cuts = 0
    for index, record in enumerate(records):
        try:
            row, cut = prepare(record)
        except _TooLong as reason:
            where = f"record {index + 1} ({_excerpt(record)})"
            if on_too_long == "error":
                raise DataError(
                    f"{where}: {reason}, over {max_tokens} tokens; raise the limit or set data.on_too_long=drop"
                ) from None
            dropped.append(Dropped(where, str(reason)))
            continue
        rows.append(row)
        indices.append(index)
        cuts += cut
    return Prepared(tuple(rows), tuple(indices), tuple(dropped), cuts)


def _excerpt(record: Demonstration | Ranking | Rating | Prompt) -> str:
    messages: Iterable[Message] = record.prompt.messages if isinstance(record, Ranking | Rating) else record.messages
    words = " ".join(next((m.content for m in messages if m.role == "user"), "").split())
    return repr(words if len(words) <= 60 else words[:57] + "...")
