"""TRL 1.16's SFT, reward and DPO trainers: steps of 8 rows or pairs, with the settings that make the work ours.

asked: what, model, data ({"messages"} or {"prompt", "answers", "ranks"}), out, rows, timed, max_tokens, lora, bf16.
"""

from __future__ import annotations

import json
import sys

import torch
from clock import Clock, alike, tell
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

asked = json.loads(sys.argv[1])
what = asked["what"]
Trainer, Config, kind, task = {
    "sft": (SFTTrainer, SFTConfig, AutoModelForCausalLM, "CAUSAL_LM"),
    "dpo": (DPOTrainer, DPOConfig, AutoModelForCausalLM, "CAUSAL_LM"),
    "reward": (RewardTrainer, RewardConfig, AutoModelForSequenceClassification, "SEQ_CLS"),
}[what]


def row_of(line):
    row = json.loads(line)
    if what == "sft":
        return row
    by_rank = [answer for _, answer in sorted(zip(row["ranks"], row["answers"], strict=True))]
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in by_rank)
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


with open(asked["data"], encoding="utf-8") as lines:
    rows = Dataset.from_list([row_of(line) for line in lines])
options = {"num_labels": 1} if what == "reward" else {}
clock = Clock()
trainer = Trainer(
    model=kind.from_pretrained(asked["model"], dtype=torch.float32, **options),
    args=Config(
        **alike(asked),
        per_device_train_batch_size=asked["rows"],
        gradient_accumulation_steps=1,
        max_length=asked["max_tokens"],
    ),
    train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(asked["model"]),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task) if asked["lora"] else None,
    callbacks=[clock],
)
trainer.train()
columns = [name for name in trainer.train_dataset.column_names if name.endswith("ids")]
tokens = sum(len(row[name]) for row in trainer.train_dataset for name in columns)
tell(
    clock,
    asked,
    compute="bfloat16 autocast" if asked["bf16"] else "float32",
    data_tokens=tokens / asked["timed"],
    columns=columns,
)
