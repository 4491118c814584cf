"""A frozen linear layer with low-rank additions (Hu et al. 2021)."""

from __future__ import annotations

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

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        name = self.active
        if name is None or name not in self.down:
            plain: Tensor = self.base(x)
            return plain
        if self.merged is not None and self.merged[0] == name:
            return few_rows.linear(x, self.merged[1], self.base.bias)  # type: ignore[arg-type]
        if not (self.training and self.dropout[name]):
            adapted: Tensor = _Adapted.apply(x, *self.addends(name))  # type: ignore[no-untyped-call]
            return adapted
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
    """x W' + b + scale x down' up', added up in place: x and x down' stay, and no sum of this size is made twice."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        y = few_rows.linear(x, weight, bias)
        low = few_rows.linear(x, down.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        again = torch.is_grad_enabled()  # this will be derived once more, as TRPO does
        rows, of_rows = x.flatten(0, -2), of_y.flatten(0, -2)
        low = rows @ down.to(x.dtype).T if again else low.flatten(0, -2)
        of_low = ctx.scale * (of_rows @ up.to(x.dtype))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_rows @ weight
            of_x = (torch.addmm if again else Tensor.addmm_)(of_x, of_low, down.to(x.dtype)).view(x.shape)
        of_up = of_rows.T @ (ctx.scale * low)
        return of_x, None, None, (of_low.T @ rows).to(down.dtype), of_up.to(up.dtype), None
