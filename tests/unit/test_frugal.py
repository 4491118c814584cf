"""While a model learns, it keeps less for the backward pass, and computes the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dressage.config import LoraConfig
from dressage.models.backbone import Backbone
from dressage.models.frugal import frugal_parts, keeping_little
from dressage.models.reading import read, tree_of

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
TOKENS = torch.arange(60).view(3, 20).cos().mul(1000).long() % 32
DISTINCT = tree_of(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))


def backbone_of(model: Any, dtype: torch.dtype = torch.float32, adapter: bool = True, **lora: Any) -> Backbone:
    """A model under an adapter that says something, or one all of whose weights learn."""
    torch.manual_seed(1)
    backbone = Backbone(model.to(dtype).eval())
    if adapter:
        backbone.add_adapter("policy", LoraConfig(rank=3, alpha=6, **lora))
        with torch.no_grad():
            for name, parameter in backbone.adapter_state("policy").items():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
    return backbone


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | options)))


def gemma() -> Any:
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(**SIZES))


def states(backbone: Backbone) -> Tensor:
    with backbone.using("policy" if "policy" in backbone.configs else None):
        return read(backbone, DISTINCT)


def as_made(backbone: Backbone) -> None:
    """Nothing in it is frugal."""
    vars(backbone)["frugal_parts"] = []


def learning(backbone: Backbone) -> list[nn.Parameter]:
    return [weight for weight in backbone.decoder.parameters() if weight.requires_grad]


def kept(compute: Callable[[], Tensor], within: AbstractContextManager[Any] | None = None) -> int:
    """Numbers (in float32) that are alive after a forward pass and were not before, by torch's own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told, within or nullcontext():
        alive = compute()
    count = sum(event.self_device_memory_usage for event in told.events() if event.name == "[memory]")
    count = count or sum(event.self_cpu_memory_usage for event in told.events())
    return int(count) // 4 - alive.numel()


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "all weights"])
@pytest.mark.parametrize("make", [llama, gemma, lambda: llama(mlp_bias=True)], ids=["llama", "gemma", "biases"])
def test_values_and_gradients_are_those_of_the_makers_formula(make: Callable[[], Any], adapter: bool) -> None:
    backbone = backbone_of(make(), adapter=adapter)
    assert len(backbone.frugal_parts) == 2 * 3  # of each layer two norms and the gated one
    found = []
    for frugal in (True, False):
        if not frugal:
            as_made(backbone)
        y = states(backbone)
        found.append([y, *torch.autograd.grad((y * y.detach().cos()).sum(), learning(backbone), allow_unused=True)])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert not any("forward" in vars(module) for module in backbone.layers.modules())


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "all weights"])
def test_a_gradient_can_be_derived_again(adapter: bool) -> None:
    """TRPO does."""
    backbone = backbone_of(llama(), adapter=adapter)
    layer, norm = backbone.layers[0].mlp, backbone.layers[0].post_attention_layernorm
    x = torch.linspace(-2, 3, 5 * 16).view(1, 5, 16).sin().requires_grad_()
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    found = []
    for within in (keeping_little(backbone.frugal_parts), nullcontext()):
        with backbone.using("policy" if adapter else None), within:
            y = layer(norm(x)).sin().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *weights]))
    assert found[0][0].abs().max() > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "all weights"])
def test_norms_and_what_lies_between_the_halves_are_not_kept(adapter: bool) -> None:
    backbone = backbone_of(llama(), adapter=adapter)
    frugal = kept(lambda: states(backbone))
    as_made(backbone)
    plain = kept(lambda: states(backbone))
    layers, width, inner = 2, 16, 40
    # Two norms (where their weights learn also what these are multiplied with, and by what it was divided), act(gate)
    # and its product with up.
    spared = layers * (2 * (width if adapter else 2 * width + 1) + 2 * inner)
    # The first norm is made again of the embedding, which nobody else keeps if it does not learn.
    spared -= width if adapter else 0
    assert plain - frugal == DISTINCT.tokens.numel() * spared


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
    clamped = model.model.layers[0].mlp = Clamped(model.model.layers[0].mlp)
    parts = {module for module, _ in backbone_of(model).frugal_parts}
    assert clamped not in parts and model.model.layers[1].mlp in parts
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Clamped, "forward", lambda layer, x, routed: x)
        assert clamped not in {module for module, _ in frugal_parts(model.model.layers)}  # nor one that stumbles
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    assert [type(module) for module, _ in frugal_parts(backbone_of(gpt2).layers)] == [nn.LayerNorm] * 2


def test_with_dropout_or_without_an_adapter_it_is_the_plain_formula() -> None:
    backbone = backbone_of(llama(), dropout=0.5)
    layer, x = backbone.layers[0].mlp, torch.linspace(-1, 1, 48).view(3, 16)
    assert (plain := layer(x)).requires_grad is False
    with keeping_little(backbone.frugal_parts):
        assert torch.equal(layer(x), plain)
        with backbone.using("policy"):
            spoken = layer(x)
            with backbone.dropout():
                torch.manual_seed(3)
                dropped = layer(x)
                assert not torch.allclose(dropped, spoken)
    with backbone.using("policy"), backbone.dropout():
        torch.manual_seed(3)
        assert torch.equal(layer(x), dropped)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "all weights"])
def test_in_bfloat16_too(adapter: bool) -> None:
    backbone = backbone_of(llama(), torch.bfloat16, adapter=adapter)
    found = []
    for frugal in (True, False):
        if not frugal:
            as_made(backbone)
        weights = learning(backbone)
        found.append(torch.autograd.grad(states(backbone).float().square().sum(), weights, allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
