"""A batch of answers being written: the keys and values the model remembers of them, and its next logits."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from dressage.batches import Ints, Mask
from dressage.models.reading import attending, only_what_we_do, reading, tree_of
from dressage.rollout.next_token import NextToken
from dressage.tensors import position_ids

Way = Literal["plain", "in place", "as a tree", "compiled"]
"""How much of a model's usual road is left: see `Decoding`."""
AHEAD = 32
"""Columns of the cache that are cleaned beyond what is needed now."""
ATTENTION = "dressage_next_token"
"""What transformers calls our attention while one token follows the other."""


class Decoding:
    """Prompts read once each, and then one token of every answer at a time; an answer that leaves makes room.

    "plain": transformers' own cache, left-padded; the next answers wait until all have left.
    "in place": the row of an answer begins in column 0 of the cache and has a length of its own, so that another may
    take its place at any step.
    "as a tree": in place; besides, prompts are read without padding and what they begin with once (`Tree`), and keys
    that several heads share are not copied for each.
    "compiled": as a tree; besides, a token of every answer is one call (`NextToken`).
    Which columns count is known from the lengths, never looked up in the tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        rows: int,
        room: int,
        pad_token: int,
        way: Way,
    ) -> None:
        """Answers enter in the order of `prompts`, equal ones side by side. `rows`: most answers at once; `room`: most
        new tokens; `way`: see `best_way`."""
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.takes_positions = "position_ids" in accepted
        self.pad_token, self.in_place, self.as_tree = pad_token, way != "plain", way in ("as a tree", "compiled")
        self.next_token = NextToken.of(model) if way == "compiled" else None
        self.waiting = deque(map(tuple, prompts))
        self.rows = min(rows, len(prompts))
        self.capacity = max(map(len, prompts)) + room
        self.ready: Read | None = None
        self.further = 0  # how much further back tokens are told to stand than they do

        self.layers: list[PreallocatedLayer] = []
        self.cache = Cache(layers=[])
        self.mask = torch.empty(0)  # left-padded: True on tokens [B, T]
        self.lengths = torch.empty(0, dtype=torch.long, device=model.device)  # [B] tokens so far
        self.logits = torch.empty(0)  # [B, V] of the next token

    def fill(self) -> int:
        """Waiting answers enter behind the others, as far as there are rows for them; how many did."""
        before = len(self.lengths)
        if not self.in_place and before:
            return 0
        while len(self.lengths) < self.rows:
            if self.ready is None:
                if not self.waiting:
                    break
                self.ready = self._read(self.rows - len(self.lengths))
            self._enter(self.ready)
            if not self.ready.parents:
                self.ready = None
        return len(self.lengths) - before

    def advance(self, tokens: Ints) -> None:
        """One more token [B] for each answer; `logits` are then of the token after it."""
        if self.in_place:
            columns = int(self.lengths.max()) + 1
            if columns > self.capacity:
                raise IndexError(f"a token for column {columns - 1} of a cache of {self.capacity}")
            slots = torch.arange(len(tokens), device=tokens.device)
            for layer in self.layers:
                layer.end_at(slots, self.lengths, columns)
            if self.next_token is not None:
                logits = self.next_token(tokens, self.lengths, self.lengths + self.further, self.layers)
                if logits is not None:
                    self.logits, self.lengths = logits, self.lengths + 1
                    return
            seen = torch.arange(columns, device=tokens.device) <= self.lengths[:, None]
            mask = additive(seen, self.model.dtype)
        else:
            mask = self.mask = F.pad(self.mask, (0, 1), value=True)
        with attending(self.model, ATTENTION) if self.as_tree else nullcontext():
            self.logits = self._forward(tokens[:, None], mask, self.lengths[:, None] + self.further, self.cache)
        self.lengths = self.lengths + 1

    def keep(self, slots: Ints) -> None:
        """From now on answer i is the one that was at `slots[i]`; the others leave the batch."""
        if self.in_place:
            moved = (slots != torch.arange(len(slots), device=slots.device)).nonzero().squeeze(-1)
            if len(moved):
                longest = int(self.lengths[slots[moved]].max())
                for layer in self.layers:
                    layer.move(slots[moved], moved, longest)
        elif len(slots):
            self.mask = self.mask[slots]
            self.cache.batch_select_indices(slots)
        self.lengths, self.logits = self.lengths[slots], self.logits[slots]

    def _read(self, free: int) -> Read:
        """The model's memory of the next prompts.

        In place it reads ahead, because a few prompts together take less time than one after the other; and all
        answers to one prompt, because that is read once.
        """
        count = max(free, self.rows // 4) if self.in_place else free
        prompts: list[tuple[int, ...]] = []
        while self.waiting and (len(prompts) < count or (self.in_place and self.waiting[0] == prompts[-1])):
            prompts.append(self.waiting.popleft())
        unique = list(dict.fromkeys(prompts))
        number = {prompt: i for i, prompt in enumerate(unique)}
        parents = deque(number[prompt] for prompt in prompts)
        tokens, mask = left_padded(unique, self.pad_token, self.model.device)
        cache = DynamicCache(config=self.model.config)
        if self.as_tree:
            return self._read_tree(tokens, mask, cache, parents)
        logits = self._forward(tokens, mask, position_ids(mask), cache)
        width, lengths = mask.shape[-1], mask.sum(-1, keepdim=True)
        # Their first tokens come to column 0; behind their last one nothing is looked at.
        columns = (width - lengths + torch.arange(width, device=mask.device)).clamp(max=width - 1)
        return Read(cache, mask, torch.arange(len(unique), device=mask.device), columns, logits, parents)

    def _read_tree(self, tokens: Ints, mask: Mask, cache: DynamicCache, parents: deque[int]) -> Read:
        tree = tree_of(tokens, mask)
        last = tree.rows.gather(-1, mask.sum(-1, keepdim=True) - 1).squeeze(-1)
        inputs: dict[str, Any] = {"logits_to_keep": last} if self.extra else {}
        with reading(tree, self.model):
            output = self.model(
                input_ids=tree.tokens[None],
                position_ids=tree.positions[None],
                past_key_values=cache,
                use_cache=True,
                **inputs,
            )
        logits = output.logits[0] if self.extra else output.logits[0, last]
        return Read(cache, mask, torch.zeros_like(last), tree.rows, logits, parents)

    def _enter(self, read: Read) -> None:
        """As many of these answers as there is room for."""
        begin = len(self.lengths)
        count = min(self.rows - begin, len(read.parents))
        parents = torch.tensor([read.parents.popleft() for _ in range(count)], device=self.lengths.device)
        mask = read.mask[parents]
        lengths = mask.sum(-1)
        if not self.in_place:
            self.mask, self.cache = mask, read.cache
            if count > len(read.mask):
                self.cache.batch_select_indices(parents)
        else:
            if not self.layers:
                self.layers = [PreallocatedLayer(layer, self.rows, self.capacity) for layer in read.cache.layers]
                self.cache = Cache(layers=list(self.layers))
            rows, columns = read.rows[parents, None], read.columns[parents]
            for layer, prompt in zip(self.layers, read.cache.layers, strict=True):
                layer.begin(begin, prompt, rows, columns)
        self.lengths = torch.cat([self.lengths, lengths])
        logits = read.logits[parents]
        self.logits = torch.cat([self.logits, logits]) if begin else logits

    def _forward(self, tokens: Ints, mask: Tensor, positions: Ints, cache: Cache) -> Tensor:
        inputs = self.extra | ({"position_ids": positions} if self.takes_positions else {})
        output = self.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
        logits: Tensor = output.logits[:, -1]
        return logits


@dataclass(frozen=True)
class Read:
    """Prompts that the model has read, left-padded, and the answers to them that have not entered."""

    cache: DynamicCache
    mask: Mask  # [U, T]
    rows: Ints  # [U] of the cache where each of them lies,
    columns: Ints  # [U, T] and in which columns, one after the other
    logits: Tensor  # [U, V]
    parents: deque[int]  # of each answer, its prompt's row


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values in one block with room to grow: new ones are written in place, views are returned.

    transformers' DynamicLayer copies all it has at every token.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, like: Any, rows: int, capacity: int) -> None:
        """Room for `rows` answers of `capacity` tokens, of the heads and the type of the layer `like`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = (
            block.new_empty(rows, block.shape[1], capacity, block.shape[-1]) for block in (like.keys, like.values)
        )
        self.clean = 0  # columns with numbers in them: hidden ones take part with weight 0, and 0 * NaN is NaN
        self.columns = 0
        self.is_initialized = True

    def begin(self, first: int, prompt: Any, rows: Ints, columns: Ints) -> None:
        """Rows `first`, `first` + 1, ... become rows [N, 1] and columns [N, T] of another layer."""
        count, width = columns.shape
        self._reach(width)
        for block, read in ((self.keys, prompt.keys), (self.values, prompt.values)):
            block[first : first + count, :, :width] = read.transpose(1, 2)[rows, columns].transpose(1, 2)

    def end_at(self, slots: Ints, lengths: Ints, columns: int) -> None:
        """The next tokens go to rows `slots` [B], behind their first `lengths` [B]; `columns` will then be in use."""
        self._reach(columns)
        self.slots, self.lengths, self.columns = slots, lengths, columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, 1, dim]; returns all there is, [B, heads, T, dim]."""
        self.keys[self.slots, :, self.lengths] = key_states[:, :, 0]
        self.values[self.slots, :, self.lengths] = value_states[:, :, 0]
        rows = len(self.slots)
        return self.keys[:rows, :, : self.columns], self.values[:rows, :, : self.columns]

    def move(self, source: Ints, target: Ints, columns: int) -> None:
        """So many columns of the rows `source` take the place of the rows `target`."""
        for block in (self.keys, self.values):
            block[target, :, :columns] = block[source, :, :columns]

    def _reach(self, columns: int) -> None:
        if columns > self.clean:
            columns += AHEAD
            self.keys[:, :, self.clean : columns] = 0
            self.values[:, :, self.clean : columns] = 0
            self.clean = columns

    def get_seq_length(self) -> int:
        """Columns before the next token."""
        return self.columns - 1

    def get_max_length(self) -> int:
        """Columns at most."""
        return self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query sees, and the first of them."""
        return self.columns, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: it begins with room for all."""


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


def _next_token(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """[B, heads, 1, d] -> [B, 1, heads, d]; NotImplementedError where a model wants something else."""
    only_what_we_do(module, dropout, more)
    shared = key.shape[1] != query.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=shared
    )
    return mixed.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _next_token)


def best_way(model: PreTrainedModel) -> Way:
    """The quickest way that is right for the model: it is asked, not looked up by name.

    Nothing but "plain" where attention needs the plain mask (ALiBi, flash attention) or layers forget (sliding windows,
    states).
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "plain"

    far = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0

    def logits(way: Way) -> Tensor:
        """After one token, and after another that is told to stand as far back as the model knows places: attention may
        change with those."""
        batch = Decoding(model, [[0, 1, 1], [0, 1], [1]], rows=3, room=2, pad_token=0, way=way)
        batch.fill()
        batch.advance(torch.tensor([0, 1, 0], device=model.device))
        near = batch.logits.float()
        batch.further = max(0, far - 8)
        batch.advance(torch.tensor([1, 0, 0], device=model.device))
        return torch.cat([near, batch.logits.float()])

    plain = logits("plain")
    quicker: dict[Way, float] = {"compiled": 1e-4, "as a tree": 0.01, "in place": 0.01}
    for way, exact in quicker.items():
        try:
            if way == "compiled" and NextToken.of(model) is None:
                continue
            found = logits(way)
        except Exception:  # whatever a model stumbles over, its answer is no
            continue
        if torch.allclose(plain, found, rtol=0.0, atol=exact * float(plain.abs().max())):
            return way
    return "plain"
