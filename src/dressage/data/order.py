"""Which rows make which batch. The order has no state: to resume, the number of the step is enough."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from functools import lru_cache

IN_ATTENTION = 0.25
"""Of what a token keeps for the backward pass, by count in a layer of Llama's: for attention texts lie side by side."""


def steps_per_epoch(n_rows: int, batch_size: int) -> int:
    """Batches in which every row is seen once, the last perhaps short."""
    return -(-n_rows // batch_size)


def batch_indices(n_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of the batch of `step` (from 0): each epoch is a new permutation, and ends with what is left of it."""
    assert n_rows >= 1 and batch_size >= 1 and step >= 0, (n_rows, batch_size, step)
    epoch, batch = divmod(step, steps_per_epoch(n_rows, batch_size))
    return list(_permutation(n_rows, epoch, seed)[batch * batch_size : (batch + 1) * batch_size])


@lru_cache(maxsize=8)
def _permutation(n_rows: int, epoch: int, seed: int) -> tuple[int, ...]:
    order = list(range(n_rows))
    # Seeded by a text, not by a sum: (seed 1, epoch 2) and (seed 2, epoch 1) are different orders.
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return tuple(order)


def length_sorted_chunks(
    lengths: Sequence[int],
    max_tokens: int,
    group: Sequence[Hashable] | None = None,
    beside: Sequence[Hashable] | None = None,
    shared: Sequence[int] | None = None,
) -> list[list[int]]:
    """Cut a batch into micro-batches of at most `max_tokens` padded tokens (rows x longest), like lengths together.

    No more of them than that takes, and as even as so many can be: the largest is what memory has to hold, and comes
    first, when there are no gradients yet. Rows of one `group` stay together, in their order. A row or group that is
    over the budget by itself is a micro-batch by itself. Rows that are equal in `beside` follow each other, and are cut
    apart where the budget ends, however uneven that is; what each of them has `shared` with the others, so many tokens,
    counts once but in attention. Returns row indices; every row is in exactly one list.
    """
    together: dict[Hashable, list[int]] = {}
    for row, _ in enumerate(lengths):
        together.setdefault(row if group is None else group[row], []).append(row)
    units = sorted(((max(lengths[row] for row in rows), rows) for rows in together.values()), key=lambda unit: -unit[0])
    if beside is not None:
        # The first of each kind is its longest.
        place: dict[Hashable, int] = {}
        for _, rows in units:
            place.setdefault(beside[rows[0]], len(place))
        units.sort(key=lambda unit: place[beside[unit[1][0]]])

    def size(longest: int, count: int, distinct: int) -> float:
        padded = longest * count
        return padded if shared is None else IN_ATTENTION * padded + (1 - IN_ATTENTION) * distinct

    def cut(budget: int) -> list[tuple[float, list[int]]]:
        chunks: list[tuple[float, list[int]]] = []
        longest = distinct = 0
        before: Hashable = None  # whose row the last one is: those of one kind follow each other
        for length, rows in units:
            kind = None if beside is None else beside[rows[0]]
            alone = sum(lengths[row] for row in rows)
            known = shared[rows[0]] if shared is not None and kind == before else 0
            here = chunks[-1][1] if chunks else []
            larger = size(max(longest, length), len(here) + len(rows), distinct + alone - known)
            if here and larger <= budget:
                longest, distinct = max(longest, length), distinct + alone - known
                here += rows
                chunks[-1] = larger, here
            else:
                longest, distinct = length, alone
                chunks.append((size(length, len(rows), alone), list(rows)))
            before = kind
        return chunks

    chunks = cut(max_tokens)
    if beside is None or len(set(beside)) == len(beside):
        fewest = len(chunks)
        chunks = cut(bisect_left(range(max_tokens), True, key=lambda budget: len(cut(budget)) <= fewest))
        chunks.sort(key=lambda chunk: -chunk[0])
    # Else evener ones would part more of what is to stay together.
    return [rows for _, rows in chunks]
