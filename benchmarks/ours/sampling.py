"""Sampled tokens a second: our engine, the same with an adapter, and transformers' `generate`, in turn in one process.

asked: batches, prompt (random tokens in each), new (tokens in each answer, never fewer), rounds; with group, answers to
one prompt, our engine alone. The median of the rounds is told.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from dressage import assemble
from dressage.config import LoraConfig
from dressage.models.files import load_backbone
from dressage.models.pretrained import best_device, compute_dtype, packaged_folder
from dressage.models.roles import Role
from dressage.monitor.memory import keep_freed_memory
from dressage.pipeline import versions
from dressage.schema import Prompt, Sampling
from dressage.settings import ModelConfig

Sampler = Callable[[list[list[int]], int, int], int]
"""Prompts, new tokens and a seed to the number of tokens that were written."""


def engine(role: Role, template: Any, most: int) -> Sampler:
    built: Any = assemble.build_engine("native", role, template, most)
    built.stop_tokens = frozenset()

    def sample(prompts: list[list[int]], new: int, seed: int) -> int:
        asked = [Prompt.of(" ".join(map(str, tokens))) for tokens in prompts]
        asked = [Prompt(one.messages, tuple(tokens)) for one, tokens in zip(asked, prompts, strict=True)]
        return sum(len(one.tokens) for one in built.generate(asked, Sampling(new, seed=seed)))

    return sample


def generate(pad_token: int) -> Sampler:
    model: Any = AutoModelForCausalLM.from_pretrained(packaged_folder(), dtype=compute_dtype("auto"))
    model.to(best_device()).eval()

    @torch.inference_mode()
    def sample(prompts: list[list[int]], new: int, seed: int) -> int:
        torch.manual_seed(seed)
        # What is left unsaid, `generate` would take from the model's own: where to stop, for one.
        model.generation_config = GenerationConfig(
            do_sample=True, top_k=0, temperature=1.0, max_new_tokens=new, eos_token_id=None, pad_token_id=pad_token
        )
        tokens = torch.tensor(prompts, device=model.device)
        return model.generate(tokens, attention_mask=torch.ones_like(tokens))[:, tokens.shape[1] :].numel()

    return sample


def main() -> None:
    keep_freed_memory()  # as the command does; `generate` has the good of it too
    asked = json.loads(sys.argv[1])
    config, most = ModelConfig(), max(asked["batches"])
    template = assemble.build_template(config)
    backbone = load_backbone(config)
    plain = Role(backbone)
    samplers = {"ours": engine(plain, template, most)}
    if "group" not in asked:
        policy = assemble.build_role(backbone, "policy", LoraConfig(), seed=1)
        samplers |= {"ours, with an adapter": engine(policy, template, most), "generate": generate(template.pad_token)}
    draw = random.Random(1)
    found: dict[str, dict[int, float]] = {name: {} for name in samplers}
    for batch in asked["batches"]:
        kinds = [[draw.randrange(10, 40_000) for _ in range(asked["prompt"])] for _ in range(batch)]
        prompts = [kinds[i // asked.get("group", 1)] for i in range(batch)]
        rates: dict[str, list[float]] = {name: [] for name in samplers}
        for number in range(asked["rounds"]):
            for name, sample in samplers.items():
                sample(prompts, 2, number)  # after another's work everything is cold
                began = time.perf_counter()
                written = sample(prompts, asked["new"], number)
                rates[name].append(written / (time.perf_counter() - began))
                assert written == batch * asked["new"], (name, written)
        for name, values in rates.items():
            found[name][batch] = round(statistics.median(values), 1)
            print(name, batch, [round(value, 1) for value in values], flush=True)
    told = {
        "tokens_per_second": found,
        "compute": str(compute_dtype("auto")).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": dict(versions()),
    }
    print("RESULT", json.dumps(told))


if __name__ == "__main__":
    main()
