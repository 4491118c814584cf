"""Batches read as trees against each text read alone, by architectures that allow it and such that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from dressage.config import LoraConfig
from dressage.data.order import length_sorted_chunks
from dressage.models.backbone import Backbone
from dressage.models.reading import Trunk, new_trunk, read, reads_trees, tree_of
from dressage.models.roles import Role, ScalarHead
from dressage.models.scoring import score_sequences, score_tokens
from dressage.tensors import shared_beginning

SMALL: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE: dict[str, Any] = SMALL | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED: dict[str, Any] = WIDE | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GATED),
    "qwen2": transformers.Qwen2Config(**GATED),
    "qwen3": transformers.Qwen3Config(**GATED, head_dim=8),
    "gpt2": transformers.GPT2Config(**SMALL, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "opt": transformers.OPTConfig(**WIDE, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32),
    "mistral": transformers.MistralConfig(**GATED, sliding_window=None),
    "mistral, window of 4": transformers.MistralConfig(**GATED, sliding_window=4),
    "gemma2, windows and a cap": transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=4),
    "bloom": transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=3, n_head=4),
    "mpt": transformers.MptConfig(**SMALL, d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
    "bert": transformers.BertConfig(**WIDE, intermediate_size=64),
}
TREES = {"llama", "qwen2", "qwen3", "gpt2", "opt", "mistral"}
TEXTS = [[5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 0, 8, 2, 2, 11], [30], [5, 6, 7], [31, 6, 7, 8]]
"""One is another's beginning, two are alike, two share their beginning, two nothing."""


def backbone_of(name: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """With weights so large that attention matters."""
    torch.manual_seed(7)
    kind = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    model: Any = kind.from_config(CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() < 2))
    return Backbone(model)


def padded(left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, TEXTS)) + 1
    tokens, mask = torch.zeros(len(TEXTS), width, dtype=torch.int64), torch.zeros(len(TEXTS), width, dtype=torch.bool)
    for row, text in enumerate(TEXTS):
        start = width - len(text) if left else 0
        tokens[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = True
    return tokens, mask


def adapted(backbone: Backbone, name: str = "policy", layers: int | None = None) -> Role:
    backbone.add_adapter(name, LoraConfig(rank=4, alpha=8, layers=layers), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.adapter_state(name).values():
            parameter.normal_(0, 0.1, generator=generator)
    return Role(backbone, name)


def alone(role: Role, text: list[int]) -> torch.Tensor:
    """transformers' own states of one text without padding."""
    with role.speaking():
        states: torch.Tensor = role.backbone.decoder(input_ids=torch.tensor([text])).last_hidden_state[0]
    return states


def test_a_tree_by_hand() -> None:
    tokens = torch.tensor([[9, 5, 6, 7], [5, 6, 8, 4], [9, 9, 5, 6]])
    mask = torch.tensor([[False, True, True, True], [True] * 4, [False, False, True, True]])
    tree = tree_of(tokens, mask)
    # In dictionary order: 5 6, 5 6 7, 5 6 8 4.
    assert tree.tokens.tolist() == [5, 6, 7, 8, 4]
    assert tree.positions.tolist() == [0, 1, 2, 2, 3]
    assert tree.rows.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [0, 1, 0, 0]]
    assert tree.first.tolist() == [8, 9, 2, 6, 7]
    assert tree.place[mask].tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("left", [False, True])
def test_states_are_those_of_each_text_alone(name: str, left: bool) -> None:
    backbone = backbone_of(name)
    usual = backbone.model.config._attn_implementation
    assert reads_trees(backbone) == (name in TREES)
    role = adapted(backbone)
    tokens, mask = padded(left)
    with torch.no_grad():
        states = role.hidden(tokens, mask)
        for row, text in enumerate(TEXTS):
            assert_close(states[row][mask[row]], alone(role, text), rtol=1e-4, atol=1e-4)
    assert backbone.model.config._attn_implementation == usual, "left as it was"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_bfloat16_a_tree_is_no_further_from_float32(name: str) -> None:
    """Both ways round; the mean error of one is that of the other to a tenth."""
    exact, narrow = backbone_of(name), backbone_of(name, torch.bfloat16)
    for mine, other in zip(exact.model.parameters(), narrow.model.parameters(), strict=True):
        mine.data.copy_(other.data)
    tokens, mask = padded()
    errors = []
    with torch.no_grad():
        truth = Role(exact).hidden(tokens, mask)[mask]
        assert reads_trees(narrow)
        for trees in (True, False):
            narrow.reads_trees = trees
            errors.append((Role(narrow).hidden(tokens, mask)[mask].float() - truth).abs().mean())
    assert 0 < errors[0] < 1.1 * errors[1]


def test_each_token_is_computed_once() -> None:
    role = adapted(backbone_of("llama"))
    seen: list[int] = []
    role.backbone.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    reads_trees(role.backbone)
    seen.clear()
    role.hidden(*padded())
    # 5 6 7 8 9; nothing; 0 8 2 2 11 after 5 6; 30; nothing; 31 6 7 8.
    assert seen == [5 + 5 + 1 + 4]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_plain_path(name: str) -> None:
    """Of the adapter, through log-probs, entropy and a reward."""
    found = []
    for trees in (True, False):
        backbone = backbone_of(name)
        backbone.reads_trees = trees
        role = adapted(backbone)
        tokens, mask = padded()
        wanted = mask.clone()
        wanted[:, :2] = False
        scores = score_tokens(role, tokens, mask, wanted, entropy=True)
        judge = Role(backbone, "policy", ScalarHead.for_reward(32, 1))
        rewards = score_sequences(judge, tokens, mask, mask.sum(-1) - 1)
        assert scores.entropy is not None
        loss = (scores.logprobs * torch.arange(1, 9)).sum() + scores.entropy.square().sum() + rewards.square().sum()
        loss.backward()
        found.append((loss, torch.cat([p.grad.flatten() for p in role.parameters().values() if p.grad is not None])))
    (ours, slopes), (plain, plain_slopes) = found
    assert_close(ours, plain, rtol=1e-5, atol=0)
    assert_close(slopes, plain_slopes, rtol=0, atol=1e-5 * float(plain_slopes.abs().max()))


def test_all_weights_learn_through_a_tree() -> None:
    found = []
    for trees in (True, False):
        backbone = backbone_of("llama")
        backbone.reads_trees = trees
        tokens, mask = padded()
        wanted = mask.clone()
        wanted[:, 0] = False
        score_tokens(Role(backbone), tokens, mask, wanted).logprobs.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in backbone.model.parameters() if p.grad is not None]))
    assert_close(*found, rtol=0, atol=1e-5 * float(found[0].abs().max()))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_trunk_is_computed_once_for_all_roles(name: str) -> None:
    backbone = backbone_of(name)
    policy, reference = adapted(backbone, layers=1), Role(backbone)
    judge = adapted(backbone, "reward")  # from the first layer on: does not stand on the trunk
    tokens, mask = padded()
    plain = [role.hidden(tokens, mask) for role in (policy, reference, judge)]
    backbone.trunk = trunk = new_trunk(backbone, "policy", room=1 << 20)
    assert trunk is not None and trunk.depth == 2
    calls: list[int] = []
    for number, layer in enumerate(backbone.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    found = [role.hidden(tokens, mask) for role in (policy, reference)]
    assert calls == [0, 1, 2, 2]
    found.append(judge.hidden(tokens, mask))
    assert calls == [0, 1, 2, 2, 0, 1, 2]
    for ours, theirs in zip(found, plain, strict=True):
        assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5)
    # Other rows of texts it knows, in another order, with gradients.
    calls.clear()
    some = policy.hidden(tokens[[4, 2]], mask[[4, 2]])
    assert calls == [2]
    assert_close(some[mask[[4, 2]]], plain[0][[4, 2]][mask[[4, 2]]], rtol=1e-5, atol=1e-5)
    some.sum().backward()
    calls.clear()
    trunk.forget()
    policy.hidden(tokens, mask)
    assert calls == [0, 1, 2]


def test_a_trunk_keeps_to_its_room() -> None:
    backbone = backbone_of("llama")
    policy = adapted(backbone, layers=1)
    tokens, mask = padded()
    expected = policy.hidden(tokens, mask)[mask]
    backbone.trunk = Trunk(2, room=9 * 32 * 4)
    for _ in range(2):
        assert_close(policy.hidden(tokens, mask)[mask], expected, rtol=1e-5, atol=1e-5)
    # 5 tokens, 3, no room for 7, 1 of 1, the 3 are known, no room for 4.
    assert [len(text) for text in backbone.trunk.states] == [5, 3, 1]


def test_no_trunk_where_there_is_nothing_below_or_no_way_in() -> None:
    whole = backbone_of("llama")
    adapted(whole)
    assert new_trunk(whole, "policy", 1 << 20) is None
    assert new_trunk(whole, None, 1 << 20) is None
    for name in ("gpt2", "bloom"):  # adds positions to what it is given; reads no trees
        backbone = backbone_of(name)
        adapted(backbone, layers=1)
        assert new_trunk(backbone, "policy", 1 << 20) is None


def test_a_merged_adapter_says_the_same_and_leaves_no_trace() -> None:
    for name in ("llama", "gpt2"):
        role = adapted(backbone_of(name), layers=2)
        tokens, mask = padded()
        before = {key: weight.clone() for key, weight in role.backbone.model.state_dict().items()}
        with torch.no_grad():
            expected, plain = role.hidden(tokens, mask)[mask], Role(role.backbone).hidden(tokens, mask)[mask]
            with role.sampling():
                assert_close(role.hidden(tokens, mask)[mask], expected, rtol=1e-4, atol=1e-4)
                assert_close(Role(role.backbone).hidden(tokens, mask)[mask], plain, rtol=0, atol=0)
            assert_close(role.hidden(tokens, mask)[mask], expected, rtol=0, atol=0)
        after = role.backbone.model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_narrow_type_is_not_merged() -> None:
    """An adapter smaller than a rounding of its base would be lost."""
    role = adapted(backbone_of("llama", torch.bfloat16))
    with torch.no_grad():
        for parameter in role.backbone.adapter_state("policy").values():
            parameter.mul_(0.02)
    tokens, mask = padded()
    with torch.no_grad():
        expected = role.hidden(tokens, mask)[mask]
        with role.sampling():
            assert torch.equal(role.hidden(tokens, mask)[mask], expected)


def test_an_adapter_in_one_pass_is_base_and_addition() -> None:
    """Value, gradients and the gradient's own gradient of W x + b + s up down x, by finite differences."""
    from dressage.models.lora import _Adapted

    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    down, up = torch.randn(2, 4), torch.randn(5, 2)
    x, weight, bias, down, up = (value.double() for value in (x, weight, bias, down, up))
    for value in (x, down, up):
        value.requires_grad_()

    def ours(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _Adapted.apply(x, weight, bias, down, up, 1.5)  # type: ignore[no-untyped-call]
        return result

    assert_close(ours(x, down, up), x @ weight.T + bias + 1.5 * (x @ down.T) @ up.T)
    assert torch.autograd.gradcheck(ours, (x, down, up))
    assert torch.autograd.gradgradcheck(ours, (x, down, up))


def test_answers_to_one_prompt_are_cut_beside_each_other() -> None:
    """Lengths 9 8 | 7 3 | 5 with room for 18: the prompt of the longest first, each with its own."""
    lengths, prompts = [7, 9, 5, 3, 8], ["b", "a", "c", "b", "a"]
    assert length_sorted_chunks(lengths, 18, beside=prompts) == [[1, 4], [0, 3], [2]]
    assert length_sorted_chunks(lengths, 21, beside=prompts) == [[1, 4], [0, 3, 2]]
    assert length_sorted_chunks(lengths, 27, beside=prompts) == [[1, 4, 0], [3, 2]]
    # 16, 10 and 9 padded tokens.
    assert length_sorted_chunks(lengths, 18) == [[4, 0], [2, 3], [1]]
    # What a prompt's answers share counts once, but for the quarter that attention keeps: 6 of a's 9 and 8 tokens are
    # one prompt, so they take 18/4 + (6 + 3 + 2) * 3/4 = 12.75; with b's, which share nothing, 27/4 + 18 * 3/4 = 20.25.
    shared = [0, 6, 5, 0, 6]
    assert length_sorted_chunks(lengths, 13, beside=prompts, shared=shared) == [[1, 4], [0, 3], [2]]
    assert length_sorted_chunks(lengths, 20, beside=prompts, shared=shared) == [[1, 4], [0, 3, 2]]
    assert length_sorted_chunks(lengths, 21, beside=prompts, shared=shared) == [[1, 4, 0], [3, 2]]
    # A longer row that follows shorter ones counts.
    assert length_sorted_chunks([2, 9, 2, 8], 18, beside=["a", "a", "a", "b"]) == [[1, 0], [2, 3]]


def test_what_a_group_begins_with() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [1, 2, 7, 0], [1, 2, 3, 0], [5, 6, 0, 0]])
    real = tokens > 0
    assert shared_beginning(tokens, real, torch.tensor([0, 1, 0, 0, 2])).tolist() == [2, 2, 2, 2, 2]
    assert shared_beginning(tokens, real, torch.tensor([0, 1, 1, 0, 2])).tolist() == [3, 0, 0, 3, 2]


def test_a_tree_may_be_read_up_to_a_layer() -> None:
    backbone = backbone_of("llama")
    tokens, mask = padded()
    tree = tree_of(tokens, mask)
    with torch.no_grad():
        ours = read(backbone, tree, depth=2)[tree.place]
        for row, text in enumerate(TEXTS):
            states = backbone.decoder(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[2]
            assert_close(ours[row][mask[row]], states[0], rtol=1e-4, atol=1e-4)
