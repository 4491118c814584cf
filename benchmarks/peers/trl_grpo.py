"""TRL 1.16's GRPO: 16 answers a step, groups of 8, with the settings that make the work ours.

asked: model, data (rows {"prompt": turns}), out, rows, timed, new, group, micro_batch (rows), lora, bf16 (autocast).
"""

from __future__ import annotations

import json
import sys

import torch
from clock import Clock, alike, tell
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

asked = json.loads(sys.argv[1])
with open(asked["data"], encoding="utf-8") as lines:
    prompts = Dataset.from_list([json.loads(line) for line in lines])


def near_a_hundred_characters(completions, **_):
    return [-float(abs(len(turns[0]["content"]) - 100)) for turns in completions]


clock = Clock()
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32),
    reward_funcs=near_a_hundred_characters,
    args=GRPOConfig(
        **alike(asked),
        per_device_train_batch_size=asked["micro_batch"],
        gradient_accumulation_steps=asked["rows"] // asked["micro_batch"],
        num_generations=asked["group"],
        max_completion_length=asked["new"],
        temperature=1.0,
        beta=0.04,
    ),
    train_dataset=prompts,
    processing_class=AutoTokenizer.from_pretrained(asked["model"]),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if asked["lora"]
    else None,
    callbacks=[clock],
)
trainer.train()
lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
lengths = lengths[-asked["timed"] :]
tell(
    clock, asked, compute="bfloat16 autocast" if asked["bf16"] else "float32", answer_tokens=sum(lengths) / len(lengths)
)
