"""Where the critic begins and what it stands on: trunk, base, reward model, or a smaller model of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from dressage import assemble, assemble_rewards
from dressage.config import PpoConfig
from dressage.models.files import load_backbone, load_head
from dressage.models.pretrained import load_tokenizer
from dressage.models.roles import Role
from dressage.models.scoring import score_sequences, score_values
from dressage.monitor.writers import read_metrics
from dressage.recipe import load_stage
from dressage.training import trainer
from dressage.training.online import online_algorithm

Command = Callable[..., Any]
PEOPLE = ["Ann", "Ben", "Cem", "Dao", "Eva", "Fay"]
LEARN = ["lora={rank: 2, alpha: 4}", "training={steps: 2, checkpoint_every: 1, micro_batch_tokens: 256}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A smaller model with the tiny one's tokenizer, and reward models: on either, and one with whole weights."""
    from typer.testing import CliRunner

    from dressage.cli import app

    folder = tmp_path_factory.mktemp("critic")
    tokenizer = load_tokenizer(assemble.ModelConfig(name=str(tiny_model)))
    torch.manual_seed(3)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder / "smaller")
    tokenizer.save_pretrained(folder / "smaller")
    rows = [{"prompt": f"Who is {p}?", "chosen": f"{p} is a friend.", "rejected": "No."} for p in PEOPLE]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["reward", f'data.sources=["{folder / "rankings.jsonl"}"]', *LEARN]
    for name, model, changes in [
        ("shared", tiny_model, []),
        ("apart", folder / "smaller", []),
        ("whole", folder / "smaller", ["lora=null"]),
    ]:
        ran = CliRunner().invoke(app, [*asked, f"model.name={model}", *changes, "--out", str(folder / name)])
        assert ran.exit_code == 0, ran.output
    return folder


def ppo(made: Path, tiny_model: Path, *changes: str) -> list[str]:
    return [
        f"model.name={tiny_model}",
        f'prompts.sources=["{made / "rankings.jsonl"}"]',
        f"reward_model={made / 'shared' / 'reward'}",
        "rollout={prompts_per_step: 4, max_new_tokens: 8}",
        *LEARN,
        *changes,
    ]


def kinds(made: Path) -> dict[str, list[str]]:
    smaller = f"value.model={{name: {made / 'smaller'}}}"
    return {
        "base": ["value.start=base", "value.lora.rank=3"],
        "smaller": ["value.start=base", smaller],
        "smaller, whole": ["value.start=base", smaller, "value.lora=null"],
        "reward model apart": [f"reward_model={made / 'apart' / 'reward'}"],
        "reward model whole": [f"reward_model={made / 'whole' / 'reward'}"],
    }


KINDS = ["base", "smaller", "smaller, whole", "reward model apart", "reward model whole"]
WEIGHTS = {"smaller, whole": "model.safetensors", "reward model whole": "model.safetensors"}


def critic(made: Path, tiny_model: Path, *changes: str) -> tuple[Role, Role]:
    """The critic and the reward model of these settings, as a run begins with them."""
    config = load_stage("ppo", None, ppo(made, tiny_model, *changes))
    assert isinstance(config, PpoConfig)
    template, backbone = assemble.build_template(config.model), load_backbone(config.model)
    _, learned = assemble_rewards.build_rewards(config, backbone, template)
    built = assemble.build_value(online_algorithm(config), config, backbone, learned, template)
    assert built is not None
    return built[0], next(iter(learned.values()))


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


@pytest.mark.parametrize("name", KINDS)
def test_a_critic_begins_at_zero_or_as_the_reward_model(name: str, made: Path, tiny_model: Path) -> None:
    value, reward_model = critic(made, tiny_model, *kinds(made)[name])
    tokens, mask = texts()
    # What it says of the state before token t is a score of the text up to t - 1.
    found = score_values(value, tokens, mask, mask)[:, -1]
    if name.startswith("reward model"):
        scores = score_sequences(reward_model, tokens[:, :-1], mask[:, :-1], torch.full((3,), 5))
        assert_close(found, scores, rtol=0, atol=1e-6)
    else:
        assert not found.any()
    learnt = value.parameters()
    assert all(p.requires_grad for p in learnt.values()) and "head.weight" in learnt
    assert not {id(p) for p in learnt.values()} & {id(p) for p in reward_model.parameters().values()}
    assert not any(p.requires_grad for p in reward_model.parameters().values())


@pytest.mark.parametrize("name", KINDS)
def test_a_run_with_it_goes_on_where_it_was_stopped(
    name: str, dressage: Command, made: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and critic bit for bit; the critic has learnt, and what was saved of it is on what it stands on."""
    save = trainer.save_checkpoint

    def save_then_stop(*given: Any) -> Path:
        save(*given)
        raise KeyboardInterrupt

    asked = ["ppo", *ppo(made, tiny_model, *kinds(made)[name]), "value.warmup_steps=1", "--out"]
    ran = dressage(*asked, tmp_path / "whole")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_checkpoint", save_then_stop)
        assert dressage(*asked, tmp_path / "cut").exit_code == 130
    assert dressage(*asked, tmp_path / "cut").exit_code == 0
    for file in (
        "policy/adapter_model.safetensors",
        f"value/{WEIGHTS.get(name, 'adapter_model.safetensors')}",
        "value/head.safetensors",
    ):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file
    first = read_metrics(tmp_path / "whole")[0]
    assert first["loss/value"] > 0 and first["ratio/first_max_error"] < 1e-4
    folder = tmp_path / "whole" / "value"
    head = load_head(folder, load_backbone(assemble.saved_model(folder)))
    assert head is not None and head.weight.any()


def test_warm_up_moves_the_critic_alone(dressage: Command, made: Path, tiny_model: Path, tmp_path: Path) -> None:
    asked = ppo(made, tiny_model, *kinds(made)["smaller, whole"], "value.warmup_steps=2")
    ran = dressage("ppo", *asked, "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    from safetensors.torch import load_file

    policy = load_file(tmp_path / "run" / "policy" / "adapter_model.safetensors")
    assert not any(weight.any() for name, weight in policy.items() if "lora_B" in name)
    before = load_file(made / "smaller" / "model.safetensors")
    after = load_file(tmp_path / "run" / "value" / "model.safetensors")
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_a_dry_run_counts_the_critics_own_weights(dressage: Command, made: Path, tiny_model: Path) -> None:
    """The whole smaller model learns beside the policy's adapter, and lies in memory beside its base."""
    said = {}
    for name in ("trunk", "base", "smaller, whole"):
        changes = ["value.start=zero"] if name == "trunk" else kinds(made)[name]
        ran = dressage("ppo", *ppo(made, tiny_model, *changes), "--dry-run")
        assert ran.exit_code == 0, ran.output
        found = re.search(r"([\d,]+) of ([\d,]+) weights", ran.stdout)
        assert found
        said[name] = tuple(int(number.replace(",", "")) for number in found.groups())
    whole = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(made / "smaller").parameters())
    assert said["smaller, whole"] == (said["trunk"][0] + whole, said["trunk"][1] + whole)
    # Adapters of rank 2 and 3 on the same layers.
    assert said["base"] == (said["trunk"][0] * 5 // 2, said["trunk"][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["value.model={name: x}"], r'value\.model with value\.start="reward"'),
        (["value.start=zero", "value.lora.rank=3"], r'value\.lora with value\.start="zero"'),
        (["value.start=base", "value.lora=null"], r"value\.lora=null without value\.model"),
        (["value.start=base", "value.lora.dropout=0.1"], r"dropout"),
        (["value.start=base", "lora=null"], r'value\.start="base" with lora=null'),
        (["value.start=base", "value.model={name: x}", "algorithm=rloo", "rollout.answers_per_prompt=2"],
         r"value\.model: algorithm='rloo' has no critic"),
        (["value.start=zero", "value.warmup_steps=1"], r"value\.warmup_steps needs a critic"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(
    changes: list[str], message: str, dressage: Command, made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    ran = dressage("ppo", *ppo(made, tiny_model, *changes), "--out", tmp_path / "run")
    assert ran.exit_code != 0
    assert re.search(message, ran.output), ran.output


def test_a_critic_must_read_the_policys_tokens(dressage: Command, made: Path, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(assemble.ModelConfig(name=str(tiny_model)))
    tokenizer.add_tokens(["another"])
    LlamaForCausalLM.from_pretrained(made / "smaller").save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    changes = ["value.start=base", f"value.model={{name: {tmp_path / 'other'}}}"]
    ran = dressage("ppo", *ppo(made, tiny_model, *changes), "--out", tmp_path / "run")
    assert ran.exit_code != 0 and "another tokenizer than model.name" in ran.output
