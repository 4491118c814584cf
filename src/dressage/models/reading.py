"""Texts to hidden states: a batch is read as a tree, so that what several texts begin with is computed once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from dressage.batches import Ints, Mask
from dressage.models.backbone import Backbone
from dressage.models.frugal import keeping_little, made
from dressage.tensors import position_ids

ATTENTION = "dressage_tree"
"""What transformers calls our attention."""


@dataclass(frozen=True)
class Tree:
    """The N different tokens of a batch of texts: different in themselves or in something before them."""

    texts: list[list[int]]
    tokens: Ints  # [N]
    positions: Ints  # [N] of each in its text, from 0
    rows: Ints  # [B, L] which of the N each token of each text is; behind a text's end any
    first: Ints  # [N] where in the flattened rows each stands for the first time
    place: Ints  # [B, T] which of the N stands where in the batch as it was padded; any on padding


def tree_of(tokens: Ints, attention_mask: Mask) -> Tree:
    """Of texts [B, T], padded on either side."""
    texts = [row[real].tolist() for row, real in zip(tokens.cpu(), attention_mask.cpu(), strict=True)]
    width = max(map(len, texts))
    rows: list[list[int]] = [[]] * len(texts)
    nodes: list[int] = []
    positions: list[int] = []
    first: list[int] = []
    text: list[int] = []  # the one before
    row: list[int] = []
    # In the order of a dictionary, what a text shares with any before it, it shares with the one just before it.
    for number in sorted(range(len(texts)), key=texts.__getitem__):
        before, text = text, texts[number]
        shared = _shared(before, text)
        row = rows[number] = row[:shared] + list(range(len(nodes), len(nodes) + len(text) - shared))
        nodes += text[shared:]
        positions += range(shared, len(text))
        first += range(number * width + shared, number * width + len(text))

    def ints(values: Sequence[Any]) -> Ints:
        return torch.tensor(values, dtype=torch.int64, device=tokens.device)

    padded = ints([row + [0] * (width - len(row)) for row in rows])
    place = torch.zeros_like(tokens).masked_scatter(attention_mask.bool(), ints([*chain(*rows)]))
    return Tree(texts, ints(nodes), ints(positions), padded, ints(first), place)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for count, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return count
    return min(len(one), len(other))


def read(backbone: Backbone, tree: Tree, adapter: str | None = None, depth: int | None = None) -> Tensor:
    """Hidden states [N, H] of a tree: after all layers and the final norm, or before layer `depth`.

    The layers that no adapter reaches are asked once for each text, as long as the backbone has a trunk.
    """
    places = {"position_ids": tree.positions[None], "use_cache": False}
    trunk = backbone.trunk
    with reading(tree, backbone.model):
        if trunk is None or not trunk.carries(backbone, adapter, depth):
            return states_of(backbone, {"input_ids": tree.tokens[None]} | places, last=depth)[0]
        below = trunk.known(tree)
        if below is None:
            with torch.no_grad():
                below = states_of(backbone, {"input_ids": tree.tokens[None]} | places, last=trunk.depth)[0]
            trunk.keep(tree, below)
        return states_of(backbone, {"inputs_embeds": below[None]} | places, first=trunk.depth, last=depth)[0]


def read_padded(backbone: Backbone, tokens: Ints, attention_mask: Mask, depth: int | None = None) -> Tensor:
    """The same as [B, T, H] of a padded batch, by any architecture."""
    inputs: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": attention_mask.long(),
        "position_ids": position_ids(attention_mask) + backbone.first_position,
        "use_cache": False,
    }
    accepted = inspect.signature(backbone.decoder.forward).parameters
    return states_of(backbone, {name: value for name, value in inputs.items() if name in accepted}, last=depth)


def states_of(backbone: Backbone, inputs: Mapping[str, Any], *, first: int = 0, last: int | None = None) -> Tensor:
    """Hidden states before layer `last` (None: after all and the final norm), from layer `first` on.

    `inputs` as the decoder takes them; for a later `first` its inputs_embeds are the states before that layer.
    """
    little = keeping_little(backbone.frugal_parts) if torch.is_grad_enabled() else nullcontext()
    with _beginning(backbone, first), little:
        if last is None or last == backbone.depth:
            hidden: Tensor = backbone.decoder(**inputs).last_hidden_state
            return hidden
        # The layer after the last one that is read hands its input back, whatever the architecture.
        hook = backbone.layers[last].register_forward_pre_hook(_hand_back, with_kwargs=True)
        try:
            backbone.decoder(**inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
    raise AssertionError("the decoder did not call its layers")


@contextmanager
def _beginning(backbone: Backbone, first: int) -> Iterator[None]:
    """Within, the decoder begins with this layer."""
    owner, name = next(
        (module, name)
        for module in backbone.decoder.modules()
        for name, child in module.named_children()
        if child is backbone.layers
    )
    setattr(owner, name, backbone.layers[first:])
    try:
        yield
    finally:
        setattr(owner, name, backbone.layers)


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _hand_back(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


@dataclass
class Trunk:
    """What the layers below every adapter made of texts: nothing there learns, so once is enough."""

    depth: int
    """Layers below."""
    room: int
    """Bytes that may be kept; texts beyond are computed anew."""
    states: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    used: int = 0

    def forget(self) -> None:
        """Make room again."""
        self.states, self.used = {}, 0

    def carries(self, backbone: Backbone, adapter: str | None, depth: int | None) -> bool:
        """Whether who speaks by this adapter, and is read before layer `depth`, stands on it."""
        begins = self.depth if adapter is None else backbone.first_layer[adapter]
        return begins >= self.depth and (depth is None or depth > self.depth)

    def known(self, tree: Tree) -> Tensor | None:
        """The states [N, H] of a tree all of whose texts were kept."""
        found = [self.states.get(tuple(text)) for text in tree.texts]
        kept = [states for states in found if states is not None]
        return pad_sequence(kept, batch_first=True).flatten(0, 1)[tree.first] if len(kept) == len(found) else None

    def keep(self, tree: Tree, states: Tensor) -> None:
        """Remember these [N, H], text by text, while there is room."""
        for text, row in zip(tree.texts, tree.rows, strict=True):
            size = len(text) * states.shape[1] * states.element_size()
            if tuple(text) not in self.states and self.used + size <= self.room:
                self.used += size
                self.states[tuple(text)] = states[row[: len(text)]]


def new_trunk(backbone: Backbone, adapter: str | None, room: int) -> Trunk | None:
    """An empty one below this adapter; None where there are no layers below, or the model cannot begin above them."""
    depth = 0 if adapter is None else backbone.first_layer[adapter]
    if depth == 0 or not reads_trees(backbone):
        return None
    tree = tree_of(*_probe(backbone))
    usual = backbone.trunk
    try:
        with torch.no_grad(), backbone.using(None):
            backbone.trunk = None
            plain = read(backbone, tree).float()
            backbone.trunk = Trunk(depth, 0)
            ours = read(backbone, tree).float()
    except Exception:  # whatever a model stumbles over, its answer is no
        return None
    finally:
        backbone.trunk = usual
    return Trunk(depth, room) if _alike(plain, ours, backbone) else None


def reads_trees(backbone: Backbone) -> bool:
    """Whether the model may be given trees: it is asked once, not looked up by name.

    Not so where attention is not transformers' own, looks both ways, or forgets (sliding windows, states).
    """
    if backbone.reads_trees is None:
        with torch.no_grad(), backbone.using(None):
            backbone.reads_trees = _reads_trees(backbone)
    return backbone.reads_trees


def _reads_trees(backbone: Backbone) -> bool:
    if not backbone.model.can_generate() or any(
        type(layer) is not DynamicLayer for layer in DynamicCache(config=backbone.model.config).layers
    ):
        return False
    tokens, real = _probe(backbone)
    plain = read_padded(backbone, tokens, real).float()
    try:
        tree = tree_of(tokens, real)
        ours = F.embedding(tree.place, read(backbone, tree)).float()
    except Exception:  # whatever a model stumbles over, its answer is no
        return False
    return _alike(plain[real], ours[real], backbone)


def _probe(backbone: Backbone) -> tuple[Ints, Mask]:
    tokens = torch.tensor([[0, 1, 2, 1], [0, 1, 1, 0]], device=backbone.device)
    return tokens, torch.tensor([[True] * 4, [True] * 3 + [False]], device=backbone.device)


def _alike(plain: Tensor, ours: Tensor, backbone: Backbone) -> bool:
    exact = 1e-4 if backbone.model.dtype == torch.float32 else 0.02
    return torch.allclose(plain, ours, rtol=0.0, atol=exact * float(plain.abs().max()))


_tree: ContextVar[Tree] = ContextVar("tree")


@contextmanager
def attending(model: Any, attention: str) -> Iterator[None]:
    """Within, the model's attention is what transformers knows by this name."""
    config = model.config.get_text_config()
    usual, config._attn_implementation = config._attn_implementation, attention
    try:
        yield
    finally:
        config._attn_implementation = usual


@contextmanager
def reading(tree: Tree, model: Any) -> Iterator[None]:
    """Within, the model's row of tokens [1, N] is this tree."""
    token = _tree.set(tree)
    try:
        with attending(model, ATTENTION):
            yield
    finally:
        _tree.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Each of the N tokens attends to what stands before it in its text: [1, heads, N, d] -> [1, N, heads, d].

    Texts are laid out side by side for this alone. NotImplementedError where a model wants something else.
    """
    only_what_we_do(module, dropout, more)
    if attention_mask is not None:
        raise NotImplementedError("attention of a tree knows no masks")
    tree = _tree.get()

    def laid_out(states: Tensor) -> Tensor:
        # The gradient of a lookup is added up quickly, that of an index is not.
        table = states[0].transpose(0, 1).flatten(1)
        side_by_side: Tensor = F.embedding(tree.rows, table).unflatten(-1, (states.shape[1], -1)).transpose(1, 2)
        return side_by_side

    query, key, value = laid_out(query), laid_out(key), laid_out(value)
    mixed = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )

    def of_each(mixed: Tensor) -> Tensor:
        return F.embedding(tree.first, mixed.transpose(1, 2).flatten(0, 1).flatten(1))

    found = made(of_each(mixed), partial(of_each, mixed.detach()))
    return found.unflatten(-1, (mixed.shape[1], -1))[None], None


def only_what_we_do(module: nn.Module, dropout: float, more: Mapping[str, Any]) -> None:
    """NotImplementedError where a model wants more of attention than a product, a softmax and a product."""
    odd = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if odd or dropout or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"our attention knows no {', '.join(odd) or 'dropout, and looks back only'}")


AttentionInterface.register(ATTENTION, _attention)
