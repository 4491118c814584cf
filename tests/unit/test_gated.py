"""Gated layers under an adapter keep less for the backward pass, and compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dressage.config import LoraConfig
from dressage.models.backbone import Backbone
from dressage.models.lora import keep_all

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
X = torch.linspace(-2, 3, 5 * 16).view(1, 5, 16).sin()


def adapted(model: Any, dtype: torch.dtype = torch.float32, **lora: Any) -> tuple[Backbone, Any]:
    """A model under an adapter that says something, and its first gated layer."""
    torch.manual_seed(1)
    backbone = Backbone(model.to(dtype).eval())
    backbone.add_adapter("policy", LoraConfig(rank=3, alpha=6, **lora))
    with torch.no_grad():
        for name, parameter in backbone.adapter_state("policy").items():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return backbone, backbone.layers[0].mlp


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options))


def gemma() -> Any:
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(**SIZES))


def kept(compute: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what is kept for the backward pass, each tensor once."""
    found: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return list(found.values())


@pytest.mark.parametrize("make", [llama, gemma, lambda: llama(mlp_bias=True)])
def test_values_and_gradients_are_those_of_the_makers_formula(make: Callable[[], Any]) -> None:
    backbone, layer = adapted(make())
    assert "forward" in vars(layer)
    found = []
    for frugal in (True, False):
        if not frugal:
            keep_all(layer)
        x = X.clone().requires_grad_()
        with backbone.using("policy"):
            y = layer(x)
        weights = [p for p in layer.parameters() if p.requires_grad]
        assert len(weights) == 6
        found.append([y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, *weights])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(found[0][0], found[1][0])


def test_a_gradient_can_be_derived_again() -> None:
    """TRPO does. Known from finite differences, in float64."""
    backbone, layer = adapted(llama(), torch.float64)
    for linear in backbone.linears.values():
        linear.down.double(), linear.up.double()
    weights = [p for p in layer.parameters() if p.requires_grad]
    x = X[:, :2].double().requires_grad_()

    def loss(*given: Tensor) -> Tensor:
        with backbone.using("policy"):
            return layer(given[0]).sin().sum()

    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    along = torch.ones_like(x)
    second = torch.autograd.grad((first * along).sum(), [x, weights[-1]])
    step = 1e-6
    # The second derivative along a direction is how the first one changes.
    moved = [(x + sign * step * along).detach().requires_grad_() for sign in (1, -1)]
    ahead, behind = (torch.autograd.grad(loss(one), one)[0] for one in moved)
    torch.testing.assert_close(second[0], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    assert second[1].abs().max() > 0


def test_only_the_two_halves_are_kept() -> None:
    backbone, layer = adapted(llama())
    wide = (1, 5, 40)

    def compute() -> Tensor:
        with backbone.using("policy"):
            out: Tensor = layer(X.clone().requires_grad_())
        return out

    assert kept(compute).count(wide) == 2
    keep_all(layer)
    assert kept(compute).count(wide) == 4


def test_what_computes_something_else_stays_as_it_is() -> None:
    class Clamped(nn.Module):
        """The parts of a gated layer, and another formula."""

        def __init__(self, made: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = made.gate_proj, made.up_proj, made.down_proj
            self.act_fn = made.act_fn

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.01) * self.up_proj(x))
            return out

    model = llama()
    model.model.layers[0].mlp = Clamped(model.model.layers[0].mlp)
    backbone, layer = adapted(model)
    assert "forward" not in vars(layer) and "forward" in vars(backbone.layers[1].mlp)
    other, layer = adapted(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)))
    assert "forward" not in vars(layer) and other.linears


def test_with_dropout_merged_or_without_an_adapter_it_is_the_plain_formula() -> None:
    backbone, layer = adapted(llama(), dropout=0.5)
    with torch.no_grad():
        base = F.linear(F.silu(layer.gate_proj.base(X)) * layer.up_proj.base(X), layer.down_proj.base.weight)
        assert torch.equal(layer(X), base)
    with backbone.using("policy"):
        spoken = layer(X)
        with backbone.merged("policy"):
            torch.testing.assert_close(layer(X), spoken, rtol=0, atol=1e-6)
        with backbone.dropout():
            assert not torch.allclose(layer(X), layer(X))
    backbone.merge("policy")
    assert "forward" not in vars(layer)


def test_in_bfloat16_too() -> None:
    backbone, layer = adapted(llama(), torch.bfloat16)
    found = []
    for frugal in (True, False):
        if not frugal:
            keep_all(layer)
        x = X.bfloat16().requires_grad_()
        with backbone.using("policy"):
            found.append(torch.autograd.grad(layer(x).float().sum(), x)[0])
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.02)
