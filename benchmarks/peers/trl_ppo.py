"""TRL 1.12, the last with a PPO trainer: PPO updates of 16 prompts, with the settings that make the work ours.

asked: model, data (rows {"prompt": turns}), out, rows, timed, new, micro_batch (rows), lora, bf16 (all weights).
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from clock import Clock, tell
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

asked = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(asked["model"], padding_side="left")
dtype = torch.bfloat16 if asked["bf16"] else torch.float32


def language_model():
    return AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype)


def scorer():
    return AutoModelForSequenceClassification.from_pretrained(asked["model"], dtype=dtype, num_labels=1)


def encoded(line):
    turns = json.loads(line)["prompt"]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


with open(asked["data"], encoding="utf-8") as lines:
    prompts = Dataset.from_dict({"input_ids": [encoded(line) for line in lines]})
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if asked["lora"] else None
clock = Clock()
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=asked["out"],
        total_episodes=2 * len(prompts),
        per_device_train_batch_size=asked["micro_batch"],
        gradient_accumulation_steps=asked["rows"] // asked["micro_batch"],
        num_mini_batches=1,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=asked["rows"],
        response_length=asked["new"],
        temperature=1.0,
        stop_token="eos",
        learning_rate=1e-5,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    ),
    processing_class=tokenizer,
    model=language_model(),
    ref_model=None if lora else language_model(),
    reward_model=scorer(),
    value_model=scorer(),
    train_dataset=prompts,
    eval_dataset=prompts.select(range(2)),
    peft_config=lora,
    callbacks=[clock],
)
trainer.train()
tell(
    clock,
    asked,
    compute=str(dtype).removeprefix("torch."),
    prompt_tokens=sum(map(len, prompts["input_ids"])) / len(prompts),
)
