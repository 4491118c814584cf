"""Roles on one base: adapters are switches, padding and batching change nothing, what is saved is what is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from dressage.config import LoraConfig
from dressage.errors import CheckpointError, ModelError
from dressage.models.backbone import Backbone
from dressage.models.files import (
    Normalisation,
    load_backbone,
    load_reward_model,
    load_role,
    save_role,
    saved_model,
    weights_hash,
)
from dressage.models.pretrained import compute_dtype, lineage
from dressage.models.roles import Role, ScalarHead
from dressage.models.scoring import score_sequences, score_tokens, score_values
from dressage.settings import ModelConfig

EXACT = {"rtol": 0.0, "atol": 1e-5}


def llama() -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def gpt2() -> Any:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


def opt() -> Any:
    torch.manual_seed(1)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def trained(backbone: Backbone, name: str, *, depth: int | None = None, layers: int | None = None) -> None:
    """An adapter that really changes the model."""
    backbone.add_adapter(name, LoraConfig(rank=4, alpha=8, layers=layers), depth=depth, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in backbone.adapter_state(name).items():
            if "lora_B" in key:
                parameter.normal_(0, 0.2, generator=generator)


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three texts of 9, 6 and 4 tokens, padded right with an id that also occurs inside them."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([9, 6, 4])
    mask = torch.arange(9) < lengths[:, None]
    tokens = torch.randint(0, 64, (3, 9), generator=generator).masked_fill(~mask, 7)
    tokens[0, 3] = 7
    wanted = mask & (torch.arange(9) >= 2)
    return tokens, mask, wanted


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_log_probs_are_those_of_the_plain_model(make: Any) -> None:
    """Against the model's own logits, shifted by hand, in the same layout: position t speaks about token t."""
    model = make()
    tokens, mask, wanted = rows()
    logits = model(input_ids=tokens, attention_mask=mask.long()).logits
    logp = torch.log_softmax(logits.double() / 0.7, -1)
    expected = torch.zeros(tokens.shape, dtype=torch.double)
    for b, t in wanted.nonzero().tolist():
        expected[b, t] = logp[b, t - 1, tokens[b, t]]
    scores = score_tokens(Role(Backbone(model)), tokens, mask, wanted, temperature=0.7, entropy=True)
    assert_close(scores.logprobs.double(), expected, **EXACT)
    assert scores.entropy is not None
    entropy = -(logp.exp() * logp).sum(-1)
    assert_close(scores.entropy[:, 1:].double(), entropy[:, :-1].masked_fill(~wanted[:, 1:], 0.0), **EXACT)


def test_the_full_kl_is_from_the_distributions_the_tokens_were_drawn_from() -> None:
    """Against both models' own logits, shifted by hand."""
    backbone = Backbone(llama())
    trained(backbone, "policy")
    policy, reference = Role(backbone, "policy"), Role(backbone)
    tokens, mask, wanted = rows()
    logp = []
    for role in (policy, reference):
        with role.speaking():
            logits = backbone.model(input_ids=tokens, attention_mask=mask.long()).logits
        logp.append(torch.log_softmax(logits.double() / 0.7, -1))
    expected = (logp[0].exp() * (logp[0] - logp[1])).sum(-1)
    found = score_tokens(policy, tokens, mask, wanted, temperature=0.7, reference=reference).full_kl
    assert found is not None and expected.amax() > 1e-3
    assert_close(found[:, 1:].double(), expected[:, :-1].masked_fill(~wanted[:, 1:], 0.0), **EXACT)


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_padding_side_and_amount_change_nothing(make: Any) -> None:
    backbone = Backbone(make())
    trained(backbone, "reward")
    role = Role(backbone, "reward", ScalarHead.for_reward(32, seed=4))
    tokens, mask, wanted = rows()
    last = mask.sum(-1) - 1
    right = score_tokens(role, tokens, mask, wanted).logprobs, score_sequences(role, tokens, mask, last)
    left = (
        torch.zeros(3, 12, dtype=torch.long),
        torch.zeros(3, 12, dtype=torch.bool),
        torch.zeros(3, 12, dtype=torch.bool),
    )
    for b, n in enumerate(mask.sum(-1).tolist()):
        for target, source in zip(left, (tokens, mask, wanted), strict=True):
            target[b, 12 - n :] = source[b, :n]
    moved = score_tokens(role, *left).logprobs
    for b, n in enumerate(mask.sum(-1).tolist()):
        assert_close(moved[b, 12 - n :], right[0][b, :n], **EXACT)
        alone = tokens[b : b + 1, :n]
        one = score_sequences(role, alone, torch.ones_like(alone, dtype=torch.bool), torch.tensor([n - 1]))
        assert_close(one[0], right[1][b], **EXACT)
    assert_close(score_sequences(role, left[0], left[1], torch.full((3,), 11)), right[1], **EXACT)


def test_values_speak_about_the_state_before_the_token() -> None:
    backbone = Backbone(llama())
    head = ScalarHead.for_reward(32, seed=4)
    tokens, mask, wanted = rows()
    hidden = backbone.model.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    by_hand = (hidden @ head.weight)[:, :-1].masked_fill(~wanted[:, 1:], 0.0)
    values = score_values(Role(backbone, head=head), tokens, mask, wanted)
    assert_close(values[:, 1:], by_hand, **EXACT)
    # The value of a state does not know the token that is chosen in it.
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 64
    assert_close(score_values(Role(backbone, head=head), changed, mask, wanted)[0, :6], values[0, :6], **EXACT)


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_adapters_off_is_the_base_and_on_is_not(make: Any) -> None:
    tokens, mask, wanted = rows()
    plain = score_tokens(Role(Backbone(make())), tokens, mask, wanted).logprobs
    backbone = Backbone(make())
    backbone.add_adapter("fresh", LoraConfig(rank=4), seed=1)
    trained(backbone, "policy")
    off = score_tokens(Role(backbone), tokens, mask, wanted).logprobs
    fresh = score_tokens(Role(backbone, "fresh"), tokens, mask, wanted).logprobs
    on = score_tokens(Role(backbone, "policy"), tokens, mask, wanted).logprobs
    assert torch.equal(off, plain)
    assert torch.equal(fresh, plain)
    assert (on - plain).abs().max() > 1e-2


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_merged_is_what_the_adapter_says(make: Any) -> None:
    tokens, mask, wanted = rows()
    backbone = Backbone(make())
    trained(backbone, "policy")
    before = score_tokens(Role(backbone, "policy"), tokens, mask, wanted).logprobs
    backbone.merge("policy")
    assert not backbone.linears
    assert_close(score_tokens(Role(backbone), tokens, mask, wanted).logprobs, before, **EXACT)


def test_only_the_adapter_learns() -> None:
    backbone = Backbone(llama())
    trained(backbone, "policy")
    trained(backbone, "value", depth=2)
    tokens, mask, wanted = rows()
    score_tokens(Role(backbone, "policy"), tokens, mask, wanted).logprobs.sum().backward()
    with_gradient = {name for name, p in backbone.model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(name.endswith(".policy") for name in with_gradient)


def test_a_shallow_role_reads_the_layer_it_names() -> None:
    """Depth 2 of 3: the state after two layers, without the final norm, on a scale a head expects."""
    model = llama()
    tokens, mask, _ = rows()
    states = model.model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    hidden = Role(Backbone(model), depth=2).hidden(tokens, mask)
    expected = torch.nn.functional.layer_norm(states[2], (32,))
    assert_close(hidden[mask], expected[mask], **EXACT)


@pytest.mark.parametrize("make", [llama, gpt2, opt])
@pytest.mark.parametrize("layers", [None, 1])
def test_the_peft_library_reads_our_adapters(make: Any, layers: int | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokens, mask, _ = rows()
    backbone = Backbone(make())
    trained(backbone, "policy", layers=layers)
    with backbone.using("policy"):
        ours = backbone.model(input_ids=tokens, attention_mask=mask.long()).logits
    save_role(tmp_path / "policy", Role(backbone, "policy"), "policy", ModelConfig(name="somewhere/else"))
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "policy")
    assert_close(theirs(input_ids=tokens, attention_mask=mask.long()).logits[mask], ours[mask], **EXACT)


def test_we_read_what_the_peft_library_writes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokens, mask, wanted = rows()
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    config_file = tmp_path / "adapter" / "adapter_config.json"
    raw = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(raw | {"base_model_name_or_path": str(tmp_path / "base")}))
    backbone = load_backbone(ModelConfig(name=str(tmp_path / "adapter"), dtype="float32"))
    ours = score_tokens(Role(backbone), tokens, mask, wanted).logprobs
    logp = torch.log_softmax(theirs(input_ids=tokens, attention_mask=mask.long()).logits, -1)
    by_hand = logp[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].masked_fill(~wanted[:, 1:], 0.0)
    assert_close(ours[:, 1:], by_hand, **EXACT)


def test_a_reward_model_scores_the_same_after_saving(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = ModelConfig(name=str(tmp_path / "base"), dtype="float32")
    backbone = load_backbone(model)
    trained(backbone, "reward", depth=2)
    head = ScalarHead.for_reward(32, seed=4)
    role = Role(backbone, "reward", head, depth=2)
    head.normalise(3.0, -0.5)
    tokens, mask, _ = rows()
    last = mask.sum(-1) - 1
    before = score_sequences(role, tokens, mask, last)
    save_role(tmp_path / "reward", role, "reward", model, normalisation=Normalisation(3.0, -0.5))
    alone = load_reward_model(tmp_path / "reward")
    shared = load_reward_model(tmp_path / "reward", load_backbone(model), model)
    assert_close(score_sequences(alone, tokens, mask, last), before, rtol=0, atol=1e-6)
    assert_close(score_sequences(shared, tokens, mask, last), before, rtol=0, atol=1e-6)


def test_normalised_scores_are_gain_times_score_plus_bias() -> None:
    head = ScalarHead.for_reward(32, seed=4)
    states = torch.randn(5, 32)
    raw = head(states)
    head.normalise(2.0, 0.25)
    assert_close(head(states), 2.0 * raw + 0.25, **EXACT)


def test_reward_head_starts_with_the_deviation_of_the_literature() -> None:
    weights = ScalarHead.for_reward(4095, seed=0).weight.detach()
    assert abs(weights.std().item() - 1 / 64) < 1e-3


def test_full_weights_are_saved_with_their_head(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = ModelConfig(name=str(tmp_path / "base"), dtype="float32")
    backbone = load_backbone(model)
    backbone.model.requires_grad_(True)
    role = Role(backbone, None, ScalarHead.for_reward(32, seed=4))
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(0.01)
    tokens, mask, _ = rows()
    before = score_sequences(role, tokens, mask, mask.sum(-1) - 1)
    save_role(tmp_path / "reward", role, "reward", model)
    again = load_reward_model(tmp_path / "reward")
    assert_close(score_sequences(again, tokens, mask, mask.sum(-1) - 1), before, rtol=0, atol=1e-6)


def test_an_adapter_on_an_adapter_finds_its_way_down_and_can_be_moved(tmp_path: Path) -> None:
    """The reference of the second stage is the first stage's policy, not the bare base."""
    run = tmp_path / "run"
    llama().save_pretrained(run / "base")
    first = ModelConfig(name=str(run / "base"), dtype="float32")
    backbone = load_backbone(first)
    trained(backbone, "policy")
    save_role(run / "sft", Role(backbone, "policy"), "policy", first)
    second = ModelConfig(name=str(run / "sft"), dtype="float32")
    stacked = load_backbone(second)
    trained(stacked, "policy")
    save_role(run / "ppo", Role(stacked, "policy"), "policy", second)
    tokens, mask, wanted = rows()
    before = score_tokens(Role(stacked, "policy"), tokens, mask, wanted).logprobs
    reference = score_tokens(Role(stacked), tokens, mask, wanted).logprobs

    run.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert [path.name for path in lineage(str(moved / "ppo")).adapters] == ["sft", "ppo"]
    assert Path(saved_model(moved / "ppo").name).resolve() == moved / "sft"
    merged = load_backbone(ModelConfig(name=str(moved / "ppo"), dtype="float32"))
    assert_close(score_tokens(Role(merged), tokens, mask, wanted).logprobs, before, **EXACT)
    below = load_backbone(ModelConfig(name=str(moved / "sft"), dtype="float32"))
    assert_close(score_tokens(Role(below), tokens, mask, wanted).logprobs, reference, **EXACT)


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = ModelConfig(name=str(tmp_path / "base"), dtype="float32")
    backbone = load_backbone(model)
    trained(backbone, "policy")
    save_role(tmp_path / "policy", Role(backbone, "policy"), "policy", model)
    weights = tmp_path / "policy" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: is damaged"):
        load_role(tmp_path / "policy", load_backbone(model), "policy")
    with pytest.raises(ModelError, match="not a reward model"):
        load_reward_model(tmp_path / "policy")


def test_absent_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        lineage(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        lineage(str(tmp_path / "empty"))


def test_the_hash_sees_every_bit() -> None:
    one = {"a": torch.tensor([1.0, 2.0])}
    other = {"a": torch.tensor([1.0, 2.0 + 2e-7])}
    assert weights_hash(one) == weights_hash({"a": torch.tensor([1.0, 2.0])})
    assert weights_hash(one) != weights_hash(other)


@pytest.mark.parametrize(
    ("amx", "avx512", "chosen"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_asks_the_processor_and_no_stopwatch(
    amx: bool, avx512: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However busy the machine is, a run that goes on computes in the type in which it began."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    assert compute_dtype("auto") is chosen
    assert compute_dtype("bfloat16") is torch.bfloat16
