"""A reward model's accuracy on the held-out part of each of its sources, beside a judge that sees only length.

    python benchmarks/reward_by_source.py runs/real-data

Reads the folder of a finished pipeline with a stage `reward`: its settings say which rankings were set apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dressage import assemble
from dressage.config import RewardConfig
from dressage.data.prepare import prepare_rankings
from dressage.data.sources import read_rankings
from dressage.models.files import load_backbone, load_reward_model
from dressage.settings import ModelConfig
from dressage.stages.comparing import ranked_scores, reward_accuracy


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder
    told = json.loads((folder / "reward" / "stage.json").read_text(encoding="utf-8"))
    config = RewardConfig.model_validate(told["settings"])
    data, model = config.data, ModelConfig.model_validate(config.model)
    template = assemble.build_template(model)
    rows = assemble.build_rows("rankings", data, template, config.seed)
    limits: dict[str, Any] = {"max_tokens": data.max_tokens, "on_too_long": data.on_too_long}
    reward_model = load_reward_model(folder / "reward" / "reward", load_backbone(model), model)
    print("| source | held-out prompts | accuracy | 95 % interval | length alone |\n|---|---|---|---|---|")
    for source in data.sources:
        path = assemble.located(source)
        of_source = set(read_rankings(path, on_bad_row=data.on_bad_row, limit=data.limit).records)
        parts = [
            prepare_rankings([r for r in kept if r in of_source], template, **limits).rows
            for kept in (rows.train_records, rows.heldout_records)
        ]
        found = reward_accuracy(ranked_scores(reward_model, parts[1]), *parts)
        print(
            f"| {Path(source).name} | {found['prompts']} | {found['accuracy']:.3f} | {found['low']:.3f} to"
            f" {found['high']:.3f} | {found['length_baseline']:.3f} |"
        )


if __name__ == "__main__":
    main()
