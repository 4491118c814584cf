"""Root-mean-square norms (Zhang and Sennrich 2019) with their gradient written out: autograd is slower by far."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def write_out(layer: nn.Module) -> None:
    """Let a norm, weight * x / sqrt(mean(x^2) + epsilon), take its gradient by the formula below.

    The norm is taken in float32, whatever x is, and only x is kept for the backward pass. A layer that is none, or
    computes something else, stays as it is.
    """
    weight, epsilon = getattr(layer, "weight", None), getattr(layer, "variance_epsilon", None)
    if "forward" in vars(layer) or not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return
    # Some norms take a gate besides.
    if weight.dim() != 1 or weight.is_meta or len(inspect.signature(layer.forward).parameters) != 1:
        return
    ours = partial(forward_of_norm, layer)
    x = torch.linspace(-1, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(2, -1)
    # Some weigh before they come back to the type of x, which shows where that is not the weight's.
    if _alike(ours, layer, x) and _alike(ours, layer, x.bfloat16()):
        layer.forward = ours


@torch.no_grad()
def _alike(ours: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> bool:
    one, other = ours(x), layer(x)
    return one.dtype == other.dtype and torch.equal(one, other)


def forward_of_norm(layer: Any, x: Tensor) -> Tensor:
    """Of x [..., H], in its type."""
    normed: Tensor = _Norm.apply(x, layer.weight, layer.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        wide = x.to(torch.float32)
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        # y = w x r with r = (mean(x^2) + epsilon)^-1/2; the gradient of sum(g x r) is r g - x r^3 mean(g x). What is
        # written here can be derived once more (TRPO does).
        x, weight = ctx.saved_tensors
        wide = x.to(torch.float32)
        scale = torch.rsqrt(torch.linalg.vecdot(wide, wide)[..., None] / wide.shape[-1] + ctx.epsilon)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_normed = (of_y * weight).to(torch.float32)
            along = torch.linalg.vecdot(of_normed, wide)[..., None] / -wide.shape[-1]
            of_x = torch.addcmul(scale * of_normed, wide, along * scale**3).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (of_y * (wide * scale).to(x.dtype)).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        return of_x, of_weight, None
