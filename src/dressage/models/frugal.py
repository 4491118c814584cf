"""What a layer keeps for the backward pass: not what can be made again without a product of matrices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dressage.models.lora import LoraLinear

Parts = Sequence[tuple[nn.Module, Callable[..., Tensor]]]
"""Modules of a model, and what takes the place of their forward pass while little is kept."""
Again = Callable[[], Tensor]


class _Kept:
    """In place of tensors that a product wants back: how each is made again."""

    def __init__(self) -> None:
        # As long as they are here, no other tensor lies where they do.
        self.made: deque[tuple[Tensor, Again]] = deque(maxlen=3)
        self.last: tuple[Again, Tensor] | None = None

    def pack(self, tensor: Tensor) -> Tensor | tuple[Again, torch.Size]:
        for made, again in self.made:
            if tensor.data_ptr() == made.data_ptr() and tensor.numel() == made.numel() and tensor.is_contiguous():
                return again, tensor.shape
        return tensor.detach()

    def unpack(self, kept: Tensor | tuple[Again, torch.Size]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        again, shape = kept
        # Several layers may have read it: their gradients follow each other.
        if self.last is None or self.last[0] is not again:
            with torch.no_grad():
                self.last = again, again()
        return self.last[1].view(shape)


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_little(parts: Parts) -> Iterator[None]:
    """Within, what the graph would keep of these parts is made again when it is wanted: the same, to the last bit."""
    kept = _Kept()
    token = _kept.set(kept)
    for module, forward in parts:
        module.forward = forward
    try:
        with saved_tensors_hooks(kept.pack, kept.unpack):
            yield
    finally:
        _kept.reset(token)
        kept.made.clear()
        for module, _ in parts:
            del module.forward


def made(tensor: Tensor, again: Again) -> Tensor:
    """This tensor, which need not be kept: `again` makes it from what is kept anyway."""
    if (kept := _kept.get()) is not None:
        kept.made.append((tensor, again))
    return tensor


def frugal_parts(layers: nn.Module) -> Parts:
    """The norms and gated layers in there, as transformers writes them; what computes something else stays as it is."""
    return [
        *((norm, partial(_norm, norm, norm.forward)) for norm in layers.modules() if _is_norm(norm)),
        *((gated, partial(_gated, gated)) for gated in layers.modules() if is_gated(gated) and _as_written(gated)),
    ]


def _is_norm(module: nn.Module) -> bool:
    bare = next(module.children(), None) is None and next(module.buffers(), None) is None
    return bare and "forward" not in vars(module) and "Norm" in type(module).__name__


def _norm(norm: nn.Module, plain: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
    """norm(x), of which only x is kept."""
    if more:
        return plain(x, *more)
    # Of float32 whose weight does not learn, nothing else would be.
    less = x.dtype != torch.float32 or any(weight.requires_grad for weight in norm.parameters())
    y: Tensor = (
        checkpoint(plain, x, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        if less
        else plain(x)
    )
    return made(y, partial(plain, x.detach()))


def is_gated(layer: nn.Module) -> bool:
    """Has it the parts of down(act(gate(x)) * up(x)), by the names that transformers gives them?"""
    parts = (getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    return all(isinstance(part, nn.Linear | LoraLinear) for part in parts) and callable(getattr(layer, "act_fn", None))


def _as_written(layer: Any) -> bool:
    weight = layer.gate_proj.weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
    try:
        with torch.no_grad():
            return torch.equal(_gated(layer, x), layer(x))
    except Exception:  # whatever a layer stumbles over, its answer is no
        return False


def _gated(layer: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x)), of which gate(x) and up(x) are kept."""
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    halves = gate.detach(), up.detach()
    acted = made(layer.act_fn(gate), lambda: layer.act_fn(halves[0]))
    y: Tensor = layer.down_proj(made(acted * up, lambda: layer.act_fn(halves[0]) * halves[1]))
    return y
