"""Our own sampler: batched decoding with the trained model's live weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dressage.errors import EngineError
from dressage.rollout.decoding import Decoding, takes_prepared_mask
from dressage.rollout.engine import evaluating, finish_of, limits_of, require_room, seeds_of
from dressage.rollout.sampler import draw, uniforms
from dressage.schema import Completion, Prompt, Sampling


class Step(NamedTuple):
    """One more token of every answer that is still being written."""

    rows: list[int]
    tokens: list[int]
    logprobs: list[float]


class NativeEngine:
    """Samples from a decoder-only transformers model, whichever adapter `active` switches on.

    The model's own forward does the arithmetic; the engine brings the cache, the mask, the draw and the bookkeeping.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_tokens: Collection[int],
        pad_token: int,
        active: Callable[[], AbstractContextManager[Any]] = nullcontext,
        max_batch: int = 64,
    ) -> None:
        self.model = model
        self.stop_tokens = frozenset(stop_tokens)
        self.pad_token = pad_token
        self.active = active
        self.max_batch = max_batch
        self.version = 0
        with self._ready():
            self.in_place = takes_prepared_mask(model)

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Takes the number only: the weights are the trained model's own."""
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """One completion for each prompt, in order."""
        require_room(prompts, sampling, self.model)
        seeds = seeds_of(prompts, sampling.seed)
        # Longest first, so that a batch too large for the memory is the first one; equal prompts side by side.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), prompts[i].tokens))
        completions: dict[int, Completion] = {}
        with self._ready():
            for start in range(0, len(order), self.max_batch):
                batch = order[start : start + self.max_batch]
                tokens: list[list[int]] = [[] for _ in batch]
                logprobs: list[list[float]] = [[] for _ in batch]
                for step in self._steps([prompts[i].tokens for i in batch], [seeds[i] for i in batch], sampling):
                    if progress is not None and len(step.rows) < len(batch):
                        progress(start + len(batch) - len(step.rows))
                    for row, token, logprob in zip(*step, strict=True):
                        tokens[row].append(token)
                        logprobs[row].append(logprob)
                for i, answer, scores in zip(batch, tokens, logprobs, strict=True):
                    finish = finish_of(answer, self.stop_tokens)
                    completions[i] = Completion(tuple(answer), tuple(scores), finish, self.version)
                if progress is not None:
                    progress(start + len(batch))
        return [completions[i] for i in range(len(prompts))]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
        """The tokens of one answer as they are drawn, the end mark included: those that `generate` would draw."""
        require_room([prompt], sampling, self.model)
        steps = self._steps([prompt.tokens], seeds_of([prompt], sampling.seed), sampling)
        while True:
            # The model is ours only while a token is computed: whoever listens may stop listening at any token.
            with self._ready():
                step = next(steps, None)
            if step is None:
                return
            yield step.tokens[0]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Within: no gradients, no dropout, the policy's adapter on."""
        with evaluating(self.model), self.active():
            yield

    def _steps(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> Iterator[Step]:
        """Decode one batch; an answer leaves it after its stop token, or at its limit."""
        device = self.model.device
        batch = Decoding(
            self.model, prompts, room=sampling.max_new_tokens, pad_token=self.pad_token, in_place=self.in_place
        )
        rows, row_seeds, limits = (
            list(range(len(prompts))),
            torch.tensor(seeds, device=device),
            limits_of(seeds, sampling),
        )
        for position in range(sampling.max_new_tokens):
            tokens, logprobs = draw(
                batch.logits,
                uniforms(row_seeds, position),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            step = Step(rows, tokens.tolist(), logprobs.tolist())
            if any(map(math.isnan, step.logprobs)):
                raise EngineError("the model's logits are NaN: its weights have diverged; go back to a checkpoint")
            yield step
            kept = filled(
                [
                    slot
                    for slot, (row, token) in enumerate(zip(rows, step.tokens, strict=True))
                    if token not in self.stop_tokens and position + 1 < limits[row]
                ]
            )
            if not kept:
                return
            if len(kept) < len(rows):
                slots = torch.tensor(kept, device=device)
                rows, row_seeds, tokens = [rows[slot] for slot in kept], row_seeds[slots], tokens[slots]
                batch.keep(slots)
            batch.advance(tokens)


def filled(live: Sequence[int]) -> list[int]:
    """The live slots (ascending), those behind moved into the holes in front: as few as possible change place.

    filled([0, 2, 3, 5]) is [0, 5, 2, 3]: slot 5 takes the place of slot 1.
    """
    count = len(live)
    result = list(range(count))
    behind = iter(reversed([slot for slot in live if slot >= count]))
    for hole in sorted(set(range(count)).difference(live)):
        result[hole] = next(behind)
    return result
