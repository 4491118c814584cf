"""Reward models on every kind of backbone: padding changes nothing, saving changes nothing, all of them learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from dressage.algorithms.catalog import algorithm
from dressage.assemble import build_reward_role, build_template
from dressage.batches import PreferenceBatch
from dressage.config import DataConfig, LoraConfig, OptimizerConfig, RewardConfig
from dressage.errors import ModelError
from dressage.models.files import load_backbone, load_reward_model, save_role
from dressage.models.pretrained import load_tokenizer, model_class
from dressage.models.roles import Role
from dressage.models.scoring import score_sequences
from dressage.monitor.writers import read_metrics
from dressage.rewards.learned import score_rows
from dressage.schema import Message, Prompt
from dressage.settings import ModelConfig
from dressage.training.optimizer import Optimizer
from dressage.training.update import Learner

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROOM = {"max_position_embeddings": 128}
HEADS = {"num_key_value_heads": 2, "intermediate_size": 48}
SHAPES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": lambda: OPTConfig(**SIZES, **ROOM, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": lambda: BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
    "llama": lambda: LlamaConfig(**SIZES, **ROOM, **HEADS),
    "qwen2": lambda: Qwen2Config(**SIZES, **ROOM, **HEADS),
    "qwen3": lambda: Qwen3Config(**SIZES, **ROOM, **HEADS, head_dim=8),
    "roberta": lambda: RobertaConfig(**SIZES, **ROOM, intermediate_size=48, pad_token_id=1, type_vocab_size=1),
    "bert": lambda: BertConfig(**SIZES, **ROOM, intermediate_size=48),
    # As deberta-v3 is: positions are relative, shared with the words, in buckets.
    "deberta-v2": lambda: DebertaV2Config(
        **SIZES, **ROOM, intermediate_size=48, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0,
    ),
}  # fmt: skip
ENCODERS = ["roberta", "bert", "deberta-v2"]
PAD = 7


def tokenizer(first: str, end: str, pad: str, **names: str) -> PreTrainedTokenizerFast:
    """Bytes, as tokens after the special ones; a text is put between `first` and `end`, as encoders' tokenizers do."""
    special = [first, pad, end, "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate([*special, *letters])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {end}", special_tokens=[(first, 0), (end, 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, mask_token="<mask>", **names)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "roberta": lambda: tokenizer("<s>", "</s>", "<pad>", bos_token="<s>", eos_token="</s>", cls_token="<s>",
                                 sep_token="</s>"),
    # It has neither a beginning of text nor an end by these names.
    "bert": lambda: tokenizer("[CLS]", "[SEP]", "[PAD]", cls_token="[CLS]", sep_token="[SEP]"),
    "deberta-v2": lambda: tokenizer("[CLS]", "[SEP]", "[PAD]", bos_token="[CLS]", eos_token="[SEP]",
                                    cls_token="[CLS]", sep_token="[SEP]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each kind on disk, encoders with a tokenizer of their own."""
    folder = tmp_path_factory.mktemp("backbones")
    for name, shape in SHAPES.items():
        torch.manual_seed(1)
        kind, options = model_class(shape())
        kind.from_config(shape(), **options).save_pretrained(folder / name)
        if name in TOKENIZERS:
            TOKENIZERS[name]().save_pretrained(folder / name)
    return {name: folder / name for name in SHAPES}


def settings(folder: Path, **changes: Any) -> RewardConfig:
    data = DataConfig(sources=("nothing",))
    return RewardConfig(data=data, model=ModelConfig(name=str(folder), dtype="float32"), **changes)


def changed(role: Role) -> Role:
    """One whose adapter says something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return role


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts of 9, 6 and 4 tokens, padded right with an id that also occurs inside them."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
    tokens = torch.randint(4, 300, (3, 9), generator=generator).masked_fill(~mask, PAD)
    tokens[0, 3] = PAD
    return tokens, mask


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", SHAPES)
def test_padding_changes_nothing_and_neither_does_saving(
    name: str, pooling: Any, backbones: dict[str, Path], tmp_path: Path
) -> None:
    config = settings(backbones[name], pooling=pooling, lora=LoraConfig(rank=2))
    role = changed(build_reward_role(config))
    tokens, mask = rows()
    last = mask.sum(-1) - 1
    right = score_sequences(role, tokens, mask, last)
    moved, real = torch.full((3, 12), PAD), torch.zeros(3, 12, dtype=torch.bool)
    for b, n in enumerate(mask.sum(-1).tolist()):
        moved[b, 12 - n :], real[b, 12 - n :] = tokens[b, :n], True
        alone = tokens[b : b + 1, :n]
        one = score_sequences(role, alone, torch.ones_like(alone, dtype=torch.bool), torch.tensor([n - 1]))
        assert_close(one[0], right[b], rtol=0, atol=1e-5)
        hidden = role.hidden(alone, torch.ones_like(alone, dtype=torch.bool))[0]
        assert role.head is not None
        by_hand = role.head(hidden.mean(0)) if pooling == "mean" else role.head(hidden[-1])
        assert_close(by_hand, right[b], rtol=0, atol=1e-5)
    assert_close(score_sequences(role, moved, real, torch.full((3,), 11)), right, rtol=0, atol=1e-5)
    assert right.std() > 1e-3

    save_role(tmp_path / "reward", role, "reward", config.model)
    again = load_reward_model(tmp_path / "reward")
    assert again.pooling == pooling
    assert_close(score_sequences(again, tokens, mask, last), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), None], ids=["adapter", "whole"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_kind_learns(name: str, lora: LoraConfig | None, backbones: dict[str, Path], tmp_path: Path) -> None:
    config = settings(backbones[name], lora=lora, pooling="mean" if name in ENCODERS else "last")
    role = build_reward_role(config)
    optimizer = Optimizer({"policy": role.parameters()}, OptimizerConfig())
    row = algorithm("reward_log_sig")
    learns = Learner(
        algorithm=row, policy=role, optimizer=optimizer, rates=lambda update: {"policy": 5e-3}, micro_batch_tokens=999
    )
    tokens, mask = rows()
    group, rank = torch.zeros(3, dtype=torch.long), torch.tensor([2, 0, 1])
    batch = PreferenceBatch(tokens, mask, mask, mask.sum(-1) - 1, group, rank)
    before = learns.measure(batch)["loss"]
    for _ in range(15):
        learns.update([batch])
    assert learns.measure(batch)["loss"] < 0.5 * before
    if lora is None:
        save_role(tmp_path / "reward", role, "reward", config.model)
        again = load_reward_model(tmp_path / "reward")
        scores = [score_sequences(one, tokens, mask, mask.sum(-1) - 1) for one in (role, again)]
        assert_close(*scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_reads_what_transformers_reads(name: str, backbones: dict[str, Path]) -> None:
    """Texts put together and padded by its own tokenizer, positions counted by the model itself."""
    backbone = load_backbone(ModelConfig(name=str(backbones[name]), dtype="float32"), to_read=True)
    words = load_tokenizer(ModelConfig(name=str(backbones[name])))
    made = words(["a short text", "a text that is somewhat longer"], padding=True, return_tensors="pt")
    mask = made.attention_mask.bool()
    theirs = backbone.model(input_ids=made.input_ids, attention_mask=made.attention_mask).last_hidden_state
    assert_close(Role(backbone).hidden(made.input_ids, mask)[mask], theirs[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_shown_turns_apart_by_its_own_marks(name: str, backbones: dict[str, Path]) -> None:
    template = build_template(ModelConfig(name=str(backbones[name])))
    talk = Prompt((Message("user", "ab"), Message("assistant", "cd"), Message("user", "<mask>")))
    first, end = ("<s>", "</s>") if name == "roberta" else ("[CLS]", "[SEP]")
    encoded = template.encode_answer(talk, "ef")
    words = template.tokenizer
    assert words.decode(encoded.tokens) == f"{first}ab{end}cd{end}<mask>{end}ef{end}"
    assert words.mask_token_id not in encoded.tokens  # a person wrote it
    assert words.decode([t for t, m in zip(encoded.tokens, encoded.loss_mask, strict=True) if m]) == f"ef{end}"
    assert template.encode_answer(talk, "ef", finished=False).tokens == encoded.tokens[:-1]


def test_an_encoder_cannot_be_a_policy(backbones: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="an encoder reads and cannot write"):
        load_backbone(ModelConfig(name=str(backbones["roberta"])))


@pytest.mark.parametrize("name", ["roberta", "deberta-v2"])
def test_ppo_against_an_encoder_with_another_tokenizer(
    name: str, dressage: Callable[..., Any], backbones: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Its texts are written anew for the reward model: the logged score is that of the words, by its own tokens."""
    people = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay"]
    lines = [{"prompt": f"Who is {p}?", "chosen": f"{p} is a friend.", "rejected": "No."} for p in people]
    data = tmp_path / "rankings.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    learn = ["lora={rank: 2, alpha: 4}", "training={steps: 2, checkpoint_every: 1, micro_batch_tokens: 256}"]
    reward = ["reward", f"model.name={backbones[name]}", f'data.sources=["{data}"]', "pooling=mean", *learn]
    ran = dressage(*reward, "--out", tmp_path / "reward")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    assert dressage(*reward, "--dry-run").exit_code == 0
    ppo = ["ppo", f"model.name={tiny_model}", f'prompts.sources=["{data}"]', "rollout.max_new_tokens=8", *learn]
    ppo += [f"reward_model={tmp_path / 'reward' / 'reward'}", "rollout.prompts_per_step=4", "kl.coef=0"]
    ppo += ["score_clip=null", "truncated=keep"]
    ran = dressage(*ppo, "--out", tmp_path / "ppo")
    assert ran.exit_code != 0 and 'set value.start="zero"' in ran.output
    ran = dressage(*ppo, "value.start=zero", "--out", tmp_path / "ppo")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    assert len(read_metrics(tmp_path / "ppo")) == 2
    sample = json.loads((tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()[0])
    template = build_template(ModelConfig(name=str(backbones[name])))
    row = template.encode_answer(Prompt.of(sample["prompt"]), sample["answer"], sample["finish"] == "stop").tokens
    score = score_rows(load_reward_model(tmp_path / "reward" / "reward"), [row])[0].item()
    assert score == pytest.approx(sample["reward"], abs=1e-4)
