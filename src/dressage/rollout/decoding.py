"""A batch of answers being written: the keys and values the model remembers of them, and its next logits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from dressage.batches import Ints, Mask
from dressage.tensors import position_ids


class Decoding:
    """Prompts read once each, and then one token of every answer at a time.

    Prompts are left-padded, so that all answers end in one column; which positions count is carried in the mask and
    the position ids, never looked up in the tokens.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, room: int, pad_token: int, in_place: bool
    ) -> None:
        """`room`: most new tokens. `in_place`: keep the cache in one block (see `takes_prepared_mask`)."""
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.takes_positions = "position_ids" in accepted

        unique = list(dict.fromkeys(map(tuple, prompts)))
        tokens, mask = left_padded(unique, pad_token, model.device)
        self.cache: Cache = DynamicCache(config=model.config)
        logits = self._forward(tokens, mask, position_ids(mask))

        number = {prompt: i for i, prompt in enumerate(unique)}
        parent = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=model.device)
        self.logits: Tensor = logits[parent]  # [B, V] of the next token
        self.lengths: Ints = mask.sum(-1)[parent]  # [B] tokens so far, padding left out
        self.columns: int = mask.shape[-1]  # tokens so far, padding included
        self.mask: Tensor = F.pad(mask[parent], (0, room), value=True)  # [B, ..., columns + room]
        if in_place:
            self.mask = additive(self.mask, model.dtype)
            self.cache = Cache([PreallocatedLayer(layer, parent, room) for layer in self.cache.layers])
        elif len(unique) < len(prompts):
            self.cache.batch_select_indices(parent)

    def advance(self, tokens: Ints) -> None:
        """One more token [B] for each answer; `logits` are then of the token after it."""
        self.columns += 1
        self.logits = self._forward(tokens[:, None], self.mask[..., : self.columns], self.lengths[:, None])
        self.lengths = self.lengths + 1

    def keep(self, slots: Ints) -> None:
        """From now on answer i is the one that was at `slots[i]`; the others leave the batch."""
        self.lengths, self.mask = self.lengths[slots], self.mask[slots]
        self.cache.batch_select_indices(slots)

    def _forward(self, tokens: Ints, mask: Tensor, positions: Ints) -> Tensor:
        inputs = self.extra | ({"position_ids": positions} if self.takes_positions else {})
        output = self.model(input_ids=tokens, attention_mask=mask, past_key_values=self.cache, use_cache=True, **inputs)
        logits: Tensor = output.logits[:, -1]
        return logits


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values in one block with room to grow: new ones are written in place, views are returned.

    transformers' DynamicLayer copies all it has at every token.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, prompt: Any, parent: Ints, room: int) -> None:
        """Begins as the prompts' keys and values [U, heads, T, dim], each repeated for its answers: parent [B] in U."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.length: int = prompt.keys.shape[-2]
        self.rows = len(parent)
        self.keys = _grown(prompt.keys, parent, room)
        self.values = _grown(prompt.values, parent, room)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, new, dim]; returns all there is, [B, heads, T, dim]."""
        begin, self.length = self.length, self.length + key_states.shape[-2]
        keys = self.keys[: self.rows, :, : self.length]
        values = self.values[: self.rows, :, : self.length]
        keys[:, :, begin:] = key_states
        values[:, :, begin:] = value_states
        return keys, values

    def batch_select_indices(self, indices: Ints) -> None:
        """Row i becomes row `indices[i]`. Moves only rows that change place, which must come from behind the kept."""
        self.rows = len(indices)
        moved = (indices != torch.arange(self.rows, device=indices.device)).nonzero().squeeze(-1)
        if len(moved):
            for block in (self.keys, self.values):
                block[moved, :, : self.length] = block[indices[moved], :, : self.length]

    def get_seq_length(self) -> int:
        """Columns so far."""
        return self.length

    def get_max_length(self) -> int:
        """Columns at most."""
        return self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query of this length sees, and the first of them."""
        return self.length + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: it begins with the prompts."""


def _grown(block: Tensor, parent: Ints, room: int) -> Tensor:
    _, heads, length, dim = block.shape
    grown = block.new_empty(len(parent), heads, length + room, dim)
    grown[:, :, :length] = block[parent]
    return grown


def left_padded(prompts: Sequence[Sequence[int]], pad_token: int, device: torch.device) -> tuple[Ints, Mask]:
    """Tokens [B, T] that all end in the last column, and a mask [B, T], True on real ones."""
    width = max(map(len, prompts))
    tokens = [[pad_token] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def additive(mask: Mask, dtype: torch.dtype) -> Tensor:
    """A mask [B, T] of keys as attention adds it to its scores, [B, 1, 1, T]: transformers then makes none itself."""
    blocked = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return blocked[:, None, None, :]


def takes_prepared_mask(model: PreTrainedModel) -> bool:
    """Whether the model may be given a prepared mask and a preallocated cache: it is asked, not looked up by name.

    Not so where attention needs the plain mask (ALiBi, flash attention) or layers forget (sliding windows, states).
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False

    def logits_after_one_token(in_place: bool) -> Tensor:
        batch = Decoding(model, [[0, 1, 1], [1]], room=1, pad_token=0, in_place=in_place)
        batch.advance(torch.tensor([0, 1], device=model.device))
        return batch.logits.float()

    plain = logits_after_one_token(False)
    try:
        prepared = logits_after_one_token(True)
    except (ValueError, RuntimeError, TypeError, IndexError):
        return False
    return bool(torch.allclose(plain, prepared, rtol=0.0, atol=0.01 * float(plain.abs().max())))
