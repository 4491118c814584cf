"""In which order a round's answers are learnt from."""

from __future__ import annotations

import random
from collections.abc import Iterator


def minibatches(n: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Rows of each minibatch: every epoch takes all n rows once, in its own order.

    The order depends on the arguments alone: to resume after k minibatches, skip k. The last of an epoch may be short.
    """
    for epoch in range(epochs):
        order = list(range(n))
        random.Random(f"{seed} {epoch}").shuffle(order)
        yield from (order[start : start + size] for start in range(0, n, size))
