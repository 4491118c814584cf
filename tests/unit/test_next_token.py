"""A token by next_token.c against the model itself in float64, and which models it is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from dressage import few_rows
from dressage.config import LoraConfig
from dressage.models.backbone import Backbone
from dressage.rollout.decoding import Decoding, best_way
from dressage.rollout.next_token import NextToken

pytestmark = pytest.mark.skipif(few_rows.kernel() is None, reason="few_rows.c was not built, or not for this processor")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "a head of keys each": (transformers.LlamaConfig, {"num_key_value_heads": 6}),
    "one head of keys": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "heads of their own width": (transformers.LlamaConfig, {"head_dim": 16}),
    "wide heads": (transformers.LlamaConfig, {"head_dim": 72}),
    "biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "one matrix for both ends": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "stretched positions": (
        transformers.LlamaConfig,
        {"rope_parameters": ROPE | {"original_max_position_embeddings": 16}},
    ),
    "qwen2": (transformers.Qwen2Config, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
}
PROMPTS = [[5, 9, 11, 4, 3, 8, 20, 1, 2, 60], [7], [30, 31, 32], [12, 50, 51, 52, 53]]


@pytest.fixture(autouse=True)
def _sampling() -> Iterator[None]:
    with torch.no_grad():
        yield


def model_of(config: Any, changes: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config(**(SIZES | changes)))
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    return model.eval()


def exact(model: Any, texts: list[list[int]]) -> Tensor:
    """Logits [B, V] after each text, by the model in float64, one text at a time and without a cache."""
    dtype = model.dtype
    model.double()
    logits = torch.cat([model(torch.tensor([text]), use_cache=False).logits[:, -1] for text in texts])
    model.to(dtype)
    return logits


def begun(model: Any, prompts: list[list[int]] = PROMPTS, rows: int = 4) -> Decoding:
    batch = Decoding(model, prompts, rows=rows, room=16, pad_token=0, way="compiled")
    batch.fill()
    assert batch.next_token is not None
    return batch


def follows(model: Any, steps: int = 6) -> None:
    """Six tokens each, texts of different length; then one leaves, and the last takes its place."""
    batch, texts = begun(model), [list(prompt) for prompt in PROMPTS]
    for step in range(steps):
        tokens = [(7 * step + 3 * row) % 61 for row in range(len(texts))]
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        batch.advance(torch.tensor(tokens))
        assert_close(batch.logits.double(), exact(model, texts), rtol=0, atol=2e-4)
        if step == 2:
            batch.keep(torch.tensor([0, 3, 2]))
            texts = [texts[0], texts[3], texts[2]]


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(*MODELS[name])
    assert best_way(model) == "compiled"
    monkeypatch.setattr(Decoding, "_forward", None)  # nobody else decodes
    follows(model)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("merged", [False, True])
def test_whoever_speaks_is_heard(rank: int, layers: int | None, merged: bool) -> None:
    """An adapter, beside the weights or in them; then the base again; then a weight that has learnt."""
    model = model_of(transformers.LlamaConfig, {"attention_bias": True})
    backbone = Backbone(model)
    backbone.add_adapter("policy", LoraConfig(rank=rank, alpha=2 * rank, layers=layers))
    plain = exact(model, [[*PROMPTS[0], 3]])
    for name, parameter in backbone.adapter_state("policy").items():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    with backbone.using("policy"):
        spoken = exact(model, [[*PROMPTS[0], 3]])
        assert (spoken - plain).abs().max() > 0.1
        if merged:
            with backbone.merged("policy"):
                follows_as(model, spoken)
        else:
            follows(model)
            follows_as(model, spoken)
    follows_as(model, plain)
    model.lm_head.weight.mul_(2.0)
    follows_as(model, 2 * plain)


def follows_as(model: Any, logits: Tensor) -> None:
    batch = begun(model, PROMPTS[:1], rows=1)
    batch.advance(torch.tensor([3]))
    assert_close(batch.logits.double(), logits, rtol=0, atol=2e-4)


@pytest.mark.usefixtures("processor")
def test_a_row_is_the_same_to_the_last_bit_whatever_stands_beside_it() -> None:
    model = model_of(*MODELS["llama"])
    prompts = [[row % 50 + 3] * (row % 9 + 1) for row in range(70)]
    together = begun(model, prompts, rows=70)
    # What was read before is the prompts' part, and torch's own: the same for all.
    entered = [(layer.keys.clone(), layer.values.clone()) for layer in together.layers]
    tokens = torch.arange(70) % 61
    together.advance(tokens)
    for rows in (1, 2, 3, 4, 5, 66):
        part = begun(model, prompts, rows=70)
        for layer, (keys, values) in zip(part.layers, entered, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        part.keep(torch.arange(rows))
        part.advance(tokens[:rows])
        assert torch.equal(part.logits, together.logits[:rows])


def test_what_has_other_parts_is_not_for_it() -> None:
    llama = transformers.LlamaConfig
    assert NextToken.of(model_of(llama, {})) is not None
    for config, changes in (
        (transformers.Qwen3Config, {"head_dim": 8}),
        (transformers.GemmaConfig, {"head_dim": 8}),
        (transformers.GPT2Config, {"n_embd": 48, "n_layer": 2, "n_head": 6}),
        (llama, {"hidden_size": 36, "head_dim": 8}),  # not in eights
        (llama, {"intermediate_size": 70}),
    ):
        assert NextToken.of(model_of(config, changes)) is None
    assert NextToken.of(model_of(llama, {}).double()) is None
    assert NextToken.of(model_of(llama, {}).bfloat16()) is None


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (transformers.GraniteConfig, {"residual_multiplier": 0.5}),
        (transformers.LlamaConfig, {"hidden_act": "gelu"}),
        (transformers.GlmConfig, {"head_dim": 8, "pad_token_id": 0}),
    ],
    ids=["steps of half a length", "another activation", "other parts"],
)
def test_what_computes_something_else_is_found_out(config: Any, changes: dict[str, Any]) -> None:
    assert best_way(model_of(config, changes)) != "compiled"


@pytest.mark.skipif(not hasattr(transformers, "Ministral3Config"), reason="this transformers has no Ministral 3")
def test_attention_that_changes_far_back_is_found_out() -> None:
    """Ministral 3 has Llama's parts, and scales queries beyond a position: a short text does not show it."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "llama_4_scaling_beta": 0.1}
    model = model_of(
        transformers.Ministral3Config,
        {"sliding_window": None, "rope_parameters": rope | {"original_max_position_embeddings": 8}, "head_dim": 8},
    )
    assert NextToken.of(model) is not None
    assert best_way(model) == "as a tree"


def test_norms_without_weights_are_not_for_it() -> None:
    model = model_of(transformers.OlmoConfig, {})
    assert NextToken.of(model) is None
    assert best_way(model) == "as a tree"


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_a_layer_of_another_size_is_not_for_it(part: str) -> None:
    model = model_of(*MODELS["llama"])
    layer = model.model.layers[1]
    if part == "mlp":
        layer.mlp.gate_proj, layer.mlp.up_proj = (torch.nn.Linear(48, 16, bias=False) for _ in range(2))
        layer.mlp.down_proj = torch.nn.Linear(16, 48, bias=False)
    else:
        layer.self_attn.k_proj, layer.self_attn.v_proj = (torch.nn.Linear(48, 8, bias=False) for _ in range(2))
    assert NextToken.of(model) is None


def test_what_has_diverged_is_seen() -> None:
    """Scores beyond float32 are NaN afterwards, as torch's are: the engine stops at NaN."""
    model = model_of(*MODELS["llama"])
    for name in ("q_proj", "k_proj"):
        model.model.layers[1].self_attn.get_submodule(name).weight.mul_(1e22)
    batch = begun(model)
    batch.advance(torch.tensor([1, 2, 3, 4]))
    assert bool(batch.logits.isnan().any())


def test_an_adapter_that_comes_later_is_heard() -> None:
    model = model_of(*MODELS["llama"])
    batch = begun(model, PROMPTS[:1], rows=1)
    backbone = Backbone(model)
    backbone.add_adapter("policy", LoraConfig(rank=4, alpha=8))
    for parameter in backbone.adapter_state("policy").values():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    plain = exact(model, [[*PROMPTS[0], 3]])
    with backbone.using("policy"):
        batch.advance(torch.tensor([3]))
    assert (batch.logits.double() - plain).abs().max() > 0.05


def test_nothing_is_written_behind_the_cache() -> None:
    batch = Decoding(model_of(*MODELS["llama"]), [[1, 2, 3]], rows=1, room=2, pad_token=0, way="compiled")
    batch.fill()
    for _ in range(2):
        batch.advance(torch.tensor([1]))
    with pytest.raises(IndexError, match="column 5 of a cache of 5"):
        batch.advance(torch.tensor([1]))


def test_somebody_who_listens_is_told() -> None:
    model, heard = model_of(*MODELS["llama"]), []
    hook = model.model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    assert NextToken.of(model) is None
    batch = Decoding(model, PROMPTS, rows=4, room=4, pad_token=0, way="compiled")
    batch.fill()
    batch.advance(torch.tensor([1, 2, 3, 4]))
    assert len(heard) == 2
    hook.remove()
    to_all = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert NextToken.of(model) is None
    to_all.remove()
    assert NextToken.of(model) is not None
    model.forward = model.forward
    assert NextToken.of(model) is None


def test_torch_goes_on_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many rows, and a gradient: each step by itself, on the same keys and values."""
    model, texts = model_of(*MODELS["llama"]), [list(prompt) for prompt in PROMPTS]
    batch = begun(model)
    usual = few_rows.MOST
    for step, most in enumerate((usual, 3, usual, usual, 0, usual)):
        monkeypatch.setattr(few_rows, "MOST", most)
        for text in texts:
            text.append(step + 5)
        with torch.set_grad_enabled(step == 3):
            batch.advance(torch.full((4,), step + 5))
        assert batch.logits.requires_grad == (step == 3)
        batch.logits = batch.logits.detach()
        assert_close(batch.logits.double(), exact(model, texts), rtol=0, atol=2e-4)
