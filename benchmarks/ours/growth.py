"""One LoRA training pass over random tokens: seconds, and what the machine's matrix products reach beside it.

asked: rows, prompt, answer (tokens in each row), passes, micro_batch_tokens, model (a name in SHAPES, or "packaged"),
and models, the folder for models of random weights.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dressage import assemble
from dressage.algorithms.catalog import algorithm
from dressage.batches import SupervisedBatch
from dressage.config import DataConfig, SftConfig, TrainingConfig
from dressage.models.files import load_backbone
from dressage.models.pretrained import packaged_folder
from dressage.monitor.memory import keep_freed_memory
from dressage.pipeline import versions
from dressage.settings import ModelConfig

SHAPES = {
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "heads": (15, 5)},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": (32, 8)},
}
"""Of SmolLM2-360M and Llama 3.2 1B; the vocabulary is SmolLM2's."""


def product_flops_per_second(dtype: torch.dtype, device: torch.device, size: int = 2048, tries: int = 5) -> float:
    """The most that large square matrix products reach here."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def model_of(name: str, models: Path) -> ModelConfig:
    """On disk, so that it is loaded by the common road."""
    if name == "packaged":
        return ModelConfig()
    folder = models / name
    if not (folder / "config.json").is_file():
        heads, kv_heads = SHAPES[name]["heads"]
        shape = {key: value for key, value in SHAPES[name].items() if key != "heads"}
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49_152, num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
            tie_word_embeddings=True, dtype=torch.bfloat16, **shape,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder.with_suffix(".partial"))
        for part in packaged_folder().glob("*token*"):
            shutil.copy(part, folder.with_suffix(".partial"))
        folder.with_suffix(".partial").rename(folder)
    return ModelConfig(name=str(folder))


def main() -> None:
    keep_freed_memory()  # as the command does
    asked = json.loads(sys.argv[1])
    config = SftConfig(
        model=model_of(asked["model"], Path(asked["models"])),
        data=DataConfig(sources=("random tokens",)),
        training=TrainingConfig(micro_batch_tokens=asked["micro_batch_tokens"]),
    )
    backbone = load_backbone(assemble.learning_model(config))
    policy = assemble.build_role(backbone, "policy", config.lora, seed=1)
    learner = assemble.build_learner(algorithm("sft"), policy, config, 100)
    rows, prompt, answer = asked["rows"], asked["prompt"], asked["answer"]
    seconds = []
    for number in range(asked["passes"] + 1):
        draw = torch.Generator().manual_seed(number)
        tokens = torch.randint(10, 40_000, (rows, prompt + answer), generator=draw)
        real = torch.ones_like(tokens, dtype=torch.bool)
        learnt = real.clone()
        learnt[:, :prompt] = False
        began = time.perf_counter()
        learner.update([SupervisedBatch(tokens, real, learnt)])
        seconds.append(time.perf_counter() - began)
    weight = backbone.model.get_output_embeddings().weight
    vocabulary, width = weight.shape
    bare = {id(p): p.numel() for p in backbone.layers.parameters() if not p.requires_grad and p.dim() == 2}
    told = {
        "seconds": statistics.median(seconds[1:]),
        "passes": [round(one, 3) for one in seconds],
        "tokens": rows * (prompt + answer),
        "answer_tokens": rows * answer,
        "inner_weights": sum(bare.values()),
        "width": width,
        "vocabulary": vocabulary,
        "peak_flops_per_second": product_flops_per_second(weight.dtype, weight.device),
        "compute": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": dict(versions()),
    }
    print("RESULT", json.dumps(told))


if __name__ == "__main__":
    main()
