"""A frozen linear layer with low-rank additions (Hu et al. 2021), and what of it is kept for the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dressage import few_rows

Addends = tuple[Tensor, Tensor | None, Tensor, Tensor, float]
"""Frozen weight [out, in] and bias, down [r, in], up [out, r] and scale."""
Computed = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]
"""The same; without an adapter down and up are none."""


class LoraLinear(nn.Module):
    """A frozen linear layer with named low-rank additions: y = base(x) + scale * up(down(x)).

    Adapters are float32, products are in the type of x.
    """

    def __init__(self, base: nn.Module, transposed: bool) -> None:
        super().__init__()
        self.base = base
        self.transposed = transposed  # GPT-2's Conv1D keeps its weight as [in, out]
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: str | None = None
        self.merged: tuple[str, Tensor] | None = None  # an adapter's name, and the weight it is added into
        self.training = False

    @property
    def weight(self) -> Tensor:
        """The base's own weight: some models look at its type."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def learning(self) -> str | None:
        """The adapter that speaks here, if it is neither part of a weight nor dropping out just now."""
        name = self.active
        if name is None or name not in self.down or (self.merged is not None and self.merged[0] == name):
            return None
        return None if self.training and self.dropout[name] else name

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        name = self.active
        if name is None or name not in self.down:
            plain: Tensor = self.base(x)
            return plain
        if self.learning is not None:
            adapted: Tensor = _Adapted.apply(x, *self.addends(name))  # type: ignore[no-untyped-call]
            return adapted
        if self.merged is not None and self.merged[0] == name:
            return few_rows.linear(x, self.merged[1], self.base.bias)  # type: ignore[arg-type]
        low = F.linear(F.dropout(x, self.dropout[name]), self.down[name].to(x.dtype))
        y: Tensor = self.base(x)
        return y + F.linear(low, (self.up[name] * self.scale[name]).to(x.dtype))

    def addends(self, name: str) -> Addends:
        """Of y = x W' + b + scale x down' up'."""
        return self.frozen_weight(), self.base.bias, self.down[name], self.up[name], self.scale[name]  # type: ignore[return-value]

    def delta(self, name: str) -> Tensor:
        """What an adapter adds to the weight [out, in], in float32."""
        added: Tensor = self.scale[name] * (self.up[name].float() @ self.down[name].float())
        return added

    def frozen_weight(self) -> Tensor:
        """[out, in], whatever the base keeps."""
        return self.weight.T if self.transposed else self.weight


def addends_of(layer: nn.Module) -> Computed | None:
    """Of a linear layer as it computes now, without dropout: y = x W' + b + scale x down' up', or only x W' + b.

    None of a layer that computes something else, or keeps its weight the other way round.
    """
    base = layer.base if isinstance(layer, LoraLinear) else layer
    if type(base) is not nn.Linear:
        return None
    if not isinstance(layer, LoraLinear) or layer.active is None or layer.active not in layer.down:
        return base.weight, base.bias, None, None, 0.0
    name = layer.active
    if layer.merged is not None and layer.merged[0] == name:
        return layer.merged[1], base.bias, None, None, 0.0
    return base.weight, base.bias, layer.down[name], layer.up[name], layer.scale[name]


class _Adapted(torch.autograd.Function):
    """x W' + b + scale x down' up', added up in place: only x is kept, and no sum of this size is made twice."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return adapted(x, (weight, bias, down, up, scale))

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        of_x = adapted_input(of_y, weight, down, up, ctx.scale) if ctx.needs_input_grad[0] else None
        return of_x, None, None, *adapted_weights(x, of_y, down, up, ctx.scale), None


def adapted(x: Tensor, addends: Addends) -> Tensor:
    """x W' + b + scale x down' up' [..., out] of x [..., in]."""
    weight, bias, down, up, scale = addends
    y = few_rows.linear(x, weight, bias)
    low = few_rows.linear(x, down.to(x.dtype))
    y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.to(x.dtype).T, alpha=scale)
    return y


# What goes back is written in products that can be derived once more (TRPO does).


def adapted_input(of_y: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The gradient [..., in] of `adapted` with respect to x."""
    of_rows = of_y.flatten(0, -2)
    of_low = scale * (of_rows @ up.to(of_y.dtype))
    return (of_rows @ weight).addmm(of_low, down.to(of_y.dtype)).view(*of_y.shape[:-1], weight.shape[1])


def adapted_weights(x: Tensor, of_y: Tensor, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of `adapted` with respect to down and up."""
    rows, of_rows = x.flatten(0, -2), of_y.flatten(0, -2)
    of_low = scale * (of_rows @ up.to(x.dtype))
    of_up = of_rows.T @ (scale * (rows @ down.to(x.dtype).T))
    return (of_low.T @ rows).to(down.dtype), of_up.to(up.dtype)


# --- gated layers -----------------------------------------------------------------------------------------------------


def is_gated(layer: nn.Module, of: type[nn.Module] = nn.Linear) -> bool:
    """Has it the parts of one, by the names that transformers gives them?"""
    parts = all(isinstance(getattr(layer, name, None), of) for name in ("gate_proj", "up_proj", "down_proj"))
    return parts and callable(getattr(layer, "act_fn", None))


def keep_halves(layer: nn.Module) -> None:
    """Let a gated layer, down(act(gate(x)) * up(x)), keep gate(x) and up(x) alone for the backward pass.

    What lies between them and `down` is two more numbers for each of theirs, and is made again in a moment. A layer
    that is none, or computes something else, stays as it is.
    """
    if "forward" in vars(layer) or not is_gated(layer, LoraLinear):
        return
    frugal = partial(forward_of_gated, layer)
    weight = next(layer.parameters())
    width = layer.gate_proj.frozen_weight().shape[1]  # type: ignore[operator, union-attr]
    x = torch.linspace(-1, 1, 2 * width, dtype=weight.dtype, device=weight.device).view(2, width)
    with torch.no_grad():
        if torch.equal(frugal(x), layer(x)):
            layer.forward = frugal


def keep_all(layer: nn.Module) -> None:
    """As the model's makers wrote it."""
    vars(layer).pop("forward", None)


def forward_of_gated(layer: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x)) [..., width], which keeps what `keep_halves` says."""
    gate, up, down = layer.gate_proj(x), layer.up_proj(x), layer.down_proj
    if torch.is_grad_enabled() and (name := down.learning) is not None:
        made: Tensor = _Gated.apply(layer.act_fn, gate, up, *down.addends(name))  # type: ignore[no-untyped-call]
        return made
    whole: Tensor = down(layer.act_fn(gate) * up)
    return whole


class _Gated(torch.autograd.Function):
    """`adapted` of act(gate) * up, which is not kept."""

    @staticmethod
    def forward(ctx: Any, act: Any, gate: Tensor, up: Tensor, *addends: Any) -> Tensor:
        weight, _, low, high, scale = addends
        ctx.save_for_backward(gate, up, weight, low, high)
        ctx.act, ctx.scale = act, scale
        return adapted(act(gate) * up, addends)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        *halves, weight, low, high = ctx.saved_tensors
        again = torch.is_grad_enabled()  # it will be derived once more
        if not again:
            halves = [half.detach().requires_grad_() for half in halves]
        with torch.enable_grad():
            product = ctx.act(halves[0]) * halves[1]
        of_low, of_high = adapted_weights(product if again else product.detach(), of_y, low, high, ctx.scale)
        of_product = adapted_input(of_y, weight, low, high, ctx.scale)
        of_halves = torch.autograd.grad(product, halves, of_product, create_graph=again)
        return None, *of_halves, None, None, of_low, of_high, None
