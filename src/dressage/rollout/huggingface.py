"""The same through transformers' own `generate`: slower, and the native engine's oracle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from dressage.rollout.decoding import left_padded
from dressage.rollout.engine import evaluating, finish_of, limits_of, require_room, seeds_of
from dressage.rollout.sampler import sample_seed
from dressage.schema import Completion, Prompt, Sampling


class HuggingFaceEngine:
    """Samples with `model.generate`. Its draws depend on the batch: a seed belongs to a batch, not to an answer."""

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

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Takes the number only: the weights are the trained model's own."""
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """One completion for each prompt, in order."""
        require_room(prompts, sampling, self.model)
        completions: list[Completion] = []
        limits = limits_of(seeds_of(prompts, sampling.seed), sampling)
        with evaluating(self.model), torch.random.fork_rng(), self.active():
            for start in range(0, len(prompts), self.max_batch):
                batch = prompts[start : start + self.max_batch]
                torch.manual_seed(sample_seed(sampling.seed, batch[0].id, start))
                own = limits[start : start + self.max_batch]
                completions += self._answers([prompt.tokens for prompt in batch], own, sampling)
                if progress is not None:
                    progress(len(completions))
        return completions

    def _answers(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], sampling: Sampling) -> list[Completion]:
        tokens, mask = left_padded(prompts, self.pad_token, self.model.device)
        drawn = sampling.temperature > 0
        filters = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        settings = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=drawn,
            eos_token_id=sorted(self.stop_tokens),
            pad_token_id=self.pad_token,
            return_dict_in_generate=True,
            output_logits=True,
            **(filters if drawn else {}),
        )
        model: Any = self.model
        # What is left unsaid, `generate` takes from the model's own settings: penalties, say, or a least length.
        own, model.generation_config = model.generation_config, settings
        try:
            output = model.generate(input_ids=tokens, attention_mask=mask.long(), generation_config=settings)
        finally:
            model.generation_config = own
        answers = output.sequences[:, tokens.shape[1] :]
        logits = torch.stack(output.logits, dim=1).float()  # [B, T, V]
        scores = (logits / (sampling.temperature or 1.0)).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
        return [self._completion(*row) for row in zip(answers.tolist(), scores.tolist(), limits, strict=True)]

    def _completion(self, tokens: list[int], logprobs: list[float], limit: int) -> Completion:
        """Up to the first stop token, behind which `generate` pads, or the limit."""
        end = next((i + 1 for i, token in enumerate(tokens[:limit]) if token in self.stop_tokens), limit)
        return Completion(
            tuple(tokens[:end]), tuple(logprobs[:end]), finish_of(tokens[:end], self.stop_tokens), self.version
        )
