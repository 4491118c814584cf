"""The work, written down once for everybody: prompts, demonstrations and pairs that fit, and a fresh reward model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from dressage import assemble
from dressage.config import LoraConfig
from dressage.data.sources import read_demonstrations, read_rankings
from dressage.data.template import ChatTemplate
from dressage.models.files import load_backbone, save_role
from dressage.models.pretrained import packaged_folder
from dressage.models.roles import ScalarHead
from dressage.schema import Message, Prompt
from dressage.settings import ModelConfig

PROMPT_TOKENS, ROW_TOKENS = 80, 512


def prompts(sft: str, template: ChatTemplate) -> Iterator[tuple[Any, int]]:
    """Instructions with their inputs, as the peers' scripts write them: the model's own system turn before them."""
    for row in json.loads(Path(sft).read_text(encoding="utf-8")):
        prompt = Prompt.of(f"{row['instruction']}\n{row['input']}")
        if (tokens := len(template.encode_prompt(prompt).tokens)) <= PROMPT_TOKENS:
            yield {"prompt": turns(prompt.messages)}, tokens


def demonstrations(sft: str, template: ChatTemplate) -> Iterator[tuple[Any, int]]:
    for one in read_demonstrations(sft).records:
        if (tokens := len(template.encode_demonstration(one).tokens)) <= ROW_TOKENS:
            yield {"messages": turns(one.messages)}, tokens


def pairs(preference: str, template: ChatTemplate) -> Iterator[tuple[Any, int]]:
    for one in read_rankings(preference, on_bad_row="drop").records:
        lengths = [len(template.encode_answer(one.prompt, answer).tokens) for answer in one.answers]
        if len(set(one.answers)) == 2 == len(set(one.ranks)) and max(lengths) <= ROW_TOKENS:
            row = {"prompt": turns(one.prompt.messages), "answers": list(one.answers), "ranks": list(one.ranks)}
            yield row, sum(lengths)


def turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{key: value for key, value in asdict(one).items() if key in ("role", "content")} for one in messages]


def main() -> None:
    asked = json.loads(sys.argv[1])
    out, model = Path(asked["out"]), ModelConfig()
    out.mkdir(parents=True, exist_ok=True)
    template = assemble.build_template(model)
    found = {
        "ppo": prompts(asked["sft"], template),
        "grpo": prompts(asked["sft"], template),
        "sft": demonstrations(asked["sft"], template),
        "pairs": pairs(asked["preference"], template),
    }
    tokens = {}
    for name, rows in found.items():
        taken = list(islice(rows, asked["rows"][name]))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row, _ in taken]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        tokens[name] = sum(count for _, count in taken) / len(taken)
    backbone = load_backbone(model)
    head = ScalarHead.for_reward(backbone.width, 1)
    role = assemble.build_role(backbone, "reward", LoraConfig(), seed=1, head=head)
    save_role(out / "reward", role, "reward", model, tokenizer=template.tokenizer)
    print("RESULT", json.dumps({"seconds": 0.0, "model": str(packaged_folder()), "tokens_a_row": tokens}))


if __name__ == "__main__":
    main()
