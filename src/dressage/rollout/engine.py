"""What the loop knows of a sampler: two methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dressage.errors import EngineError
from dressage.rollout.sampler import length_limits, sample_seed
from dressage.schema import Completion, Finish, Prompt, Sampling


class Engine(Protocol):
    """Something that answers prompts with the newest weights it was given."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """One completion for each prompt, in order; repeat a prompt to sample it again.

        `progress` is told now and then how many answers are finished. EngineError for a prompt that was not encoded or
        does not fit into the model.
        """
        ...

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Sample from these weights from now on; completions carry `version`.

        An engine that shares the trained model's live weights needs none.
        """
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: no dropout and no gradients. Afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def require_room(prompts: Sequence[Prompt], sampling: Sampling, model: PreTrainedModel) -> None:
    """EngineError for the first prompt that has no tokens, or too many for the model's positions."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        length = len(prompt.tokens)
        if length == 0:
            raise EngineError(f"prompt {prompt.id} has no tokens; encode it with the policy's chat template first")
        if positions is not None and length + sampling.max_new_tokens > positions:
            raise EngineError(
                f"a prompt of {length} tokens ({_shortened(prompt.text)!r}) and {sampling.max_new_tokens} new ones are"
                f" more than the model's {positions} positions; shorten it or lower max_new_tokens"
            )


def seeds_of(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """A seed for each answer, by which occurrence of its prompt it is."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        identity = prompt.id
        seeds.append(sample_seed(seed, identity, seen[identity]))
        seen[identity] += 1
    return seeds


def limits_of(seeds: Sequence[int], sampling: Sampling) -> list[int]:
    """Most tokens of each answer, by its seed alone."""
    if sampling.length_range is None:
        return [sampling.max_new_tokens] * len(seeds)
    return length_limits(torch.tensor(seeds), *sampling.length_range).tolist()


def finish_of(tokens: Sequence[int], stop_tokens: Collection[int]) -> Finish:
    """Why these tokens ended: a stop token can only be the last."""
    return "stop" if tokens and tokens[-1] in stop_tokens else "length"


def _shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
