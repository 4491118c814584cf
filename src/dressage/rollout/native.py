"""Our own sampler: batched decoding with the trained model's live weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dressage import few_rows
from dressage.errors import EngineError
from dressage.rollout.decoding import Decoding, best_way
from dressage.rollout.engine import evaluating, finish_of, limits_of, require_room, seeds_of
from dressage.rollout.sampler import draw, uniforms
from dressage.schema import Completion, Prompt, Sampling


class Step(NamedTuple):
    """One more token of every answer that is being written."""

    rows: list[int]  # which answers
    tokens: list[int]
    logprobs: list[float]
    finished: int  # how many of them end with it


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
            self.way = best_way(model)

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Takes the number only: the weights are the trained model's own."""
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """One completion for each prompt, in order."""
        require_room(prompts, sampling, self.model)
        seeds = seeds_of(prompts, sampling.seed)
        # Longest first, so that what is too large for the memory is seen at once; equal prompts side by side.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), prompts[i].tokens))
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        finished = 0
        with self._ready():
            for step in self._steps([prompts[i].tokens for i in order], [seeds[i] for i in order], sampling):
                for row, token, logprob in zip(step.rows, step.tokens, step.logprobs, strict=True):
                    tokens[order[row]].append(token)
                    logprobs[order[row]].append(logprob)
                if step.finished and progress is not None:
                    finished += step.finished
                    progress(finished)
        return [
            Completion(tuple(answer), tuple(scores), finish_of(answer, self.stop_tokens), self.version)
            for answer, scores in zip(tokens, logprobs, strict=True)
        ]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
        """The tokens of one answer as they are drawn, the end mark included: those that `generate` would draw."""
        return (token for _, token in self.stream_several([prompt], sampling))

    def stream_several(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, int]]:
        """Of several answers at once: the number of the prompt, and the next token of the answer to it."""
        require_room(prompts, sampling, self.model)
        steps = self._steps([prompt.tokens for prompt in prompts], seeds_of(prompts, sampling.seed), sampling)
        while True:
            # The model is ours only while a token is computed: whoever listens may stop listening at any token.
            with self._ready():
                step = next(steps, None)
            if step is None:
                return
            yield from zip(step.rows, step.tokens, strict=True)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Within: no gradients, no dropout, the policy's adapter on."""
        with evaluating(self.model), self.active(), few_rows.quick(self.model):
            yield

    def _steps(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> Iterator[Step]:
        """Decode; an answer leaves after its stop token or at its limit, and the next one enters."""
        if not prompts:
            return
        batch = Decoding(
            self.model,
            prompts,
            rows=self.max_batch,
            room=sampling.max_new_tokens,
            pad_token=self.pad_token,
            way=self.way,
        )
        all_seeds, limits = torch.tensor(seeds, device=self.model.device), limits_of(seeds, sampling)
        lengths = [0] * len(prompts)
        rows: list[int] = []  # the answer in each slot of the batch
        entered = 0
        while True:
            arrived = batch.fill()
            rows = [*rows, *range(entered, entered + arrived)]
            entered += arrived
            if not rows:
                return
            positions = torch.tensor([lengths[row] for row in rows], device=all_seeds.device)
            tokens, logprobs = draw(
                batch.logits,
                uniforms(all_seeds[rows], positions),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            drawn, scores = tokens.tolist(), logprobs.tolist()
            if any(map(math.isnan, scores)):
                raise EngineError("the model's logits are NaN: its weights have diverged; go back to a checkpoint")
            for row in rows:
                lengths[row] += 1
            kept = filled(
                [
                    slot
                    for slot, (row, token) in enumerate(zip(rows, drawn, strict=True))
                    if token not in self.stop_tokens and lengths[row] < limits[row]
                ]
            )
            yield Step(rows, drawn, scores, len(rows) - len(kept))
            if len(kept) < len(rows):
                slots = torch.tensor(kept, dtype=torch.long, device=all_seeds.device)
                rows, tokens = [rows[slot] for slot in kept], tokens[slots]
                batch.keep(slots)
            if rows:
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
