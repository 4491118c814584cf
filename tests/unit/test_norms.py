"""Norms whose gradient is written out against autograd's of the makers' formula, and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    Mamba2Config,
    Olmo2Config,
    Qwen2Config,
    Qwen3NextConfig,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dressage.models.backbone import Backbone
from dressage.models.norms import write_out

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def norm(width: int = 24, epsilon: float = 1e-3) -> LlamaRMSNorm:
    made = LlamaRMSNorm(width, epsilon)
    with torch.no_grad():
        made.weight.normal_(1.0, 0.5)
    return made


def both(made: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Values and gradients with respect to x and the weight, by our formula and by the makers'."""
    found = []
    for ours in (True, False):
        if ours:
            write_out(made)
            assert "forward" in vars(made)
        else:
            del made.forward
        x = x.detach().requires_grad_()
        y = made(x)
        found.append(
            [y, *torch.autograd.grad((y.float() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), [x, made.weight])]
        )
    return found


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_values_are_the_same_to_the_last_bit_and_gradients_to_rounding(shape: tuple[int, ...], scale: float) -> None:
    (y, of_x, of_weight), (usual, of_x_usual, of_weight_usual) = both(norm(), scale * torch.randn(shape))
    assert torch.equal(y, usual)
    assert_close(of_x, of_x_usual, rtol=1e-4, atol=1e-5 * float(of_x_usual.abs().max()))
    assert_close(of_weight, of_weight_usual, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_too() -> None:
    made = norm().bfloat16()
    (y, *gradients), (usual, *usual_gradients) = both(made, torch.randn(5, 24).bfloat16())
    assert torch.equal(y, usual)
    for one, other in zip(gradients, usual_gradients, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one, other, rtol=0.02, atol=0.05)


def test_a_gradient_can_be_derived_again() -> None:
    """The second derivative along a direction is how the makers' first one changes."""
    made, x, along = norm(8, 0.5), torch.randn(3, 8), torch.randn(3, 8)
    write_out(made)
    weights = torch.randn(3, 8)

    def first(at: Tensor, keep: bool) -> Tensor:
        at = at.requires_grad_() if not at.requires_grad else at
        return torch.autograd.grad((made(at).sin() * weights).sum(), at, create_graph=keep)[0]

    point = x.clone().requires_grad_()
    (second,) = torch.autograd.grad((first(point, True) * along).sum(), point)
    del made.forward
    step = 1e-2
    ahead, behind = (first((x + sign * step * along).detach(), False) for sign in (1, -1))
    assert_close(second, (ahead - behind) / (2 * step), rtol=0, atol=2e-3)


def test_only_what_comes_in_is_kept() -> None:
    made = norm()
    write_out(made)
    made.weight.requires_grad_(False)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: shapes.append(tuple(kept.shape)) or kept, lambda kept: kept
    ):
        made(torch.randn(5, 24, requires_grad=True))
    assert shapes == [(5, 24), (24,)]


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (LlamaConfig(**SIZES), 5),
        (Qwen2Config(**SIZES), 5),
        (GemmaConfig(**SIZES), 0),  # multiplies by 1 + weight
        (Olmo2Config(**SIZES), 0),  # weighs in float32
        (Mamba2Config(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1), 2),
        (Qwen3NextConfig(**SIZES, num_experts=0, layer_types=2 * ["linear_attention"]), 0),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_backbone_writes_out_the_norms_that_are_such(config: Any, written: int) -> None:
    """Mamba 2 and Qwen3-Next have others besides, which may be given a gate, or must."""
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        usual = model(tokens, use_cache=False).logits
        Backbone(model)
        assert torch.equal(model(tokens, use_cache=False).logits, usual)
    assert sum("forward" in vars(module) for module in model.modules()) == written


def test_what_computes_something_else_stays_as_it_is() -> None:
    class Centred(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x - x.mean(-1, keepdim=True))
            return out

    made = Centred(24)
    write_out(made)
    write_out(nn.LayerNorm(24))
    assert "forward" not in vars(made)
