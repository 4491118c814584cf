"""One of our verbs, as a user runs it, with a clock: seconds of each step, tokens, and padding that was computed.

asked: verb and settings (what follows `dressage`), out, timed (so many last steps count), rows (in a step), and
never_end (answers go on to their limit, where the peer's work is as long as its longest answer).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dressage import assemble
from dressage.cli import main as dressage
from dressage.models.pretrained import compute_dtype
from dressage.models.roles import Role
from dressage.monitor.writers import read_metrics
from dressage.pipeline import versions
from dressage.stages import learning

COMPUTED = {"positions": 0, "real": 0}
REFERENCE = {"seconds": 0.0}


def count_positions() -> None:
    """Counts what goes into the first layer while a gradient is recorded, and what of it are real tokens."""
    plain = Role.hidden

    def computed(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = given[0] if given else named["hidden_states"]
        COMPUTED["positions"] += states.shape[:-1].numel()

    def hidden(role: Role, tokens: torch.Tensor, attention_mask: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(role, tokens, attention_mask, *rest, **named)
        COMPUTED["real"] += int(attention_mask.sum())
        # Only for as long as it counts: a model with hooks is not decoded by next_token.c.
        counting = role.backbone.layers[0].register_forward_pre_hook(computed, with_kwargs=True)
        try:
            return plain(role, tokens, attention_mask, *rest, **named)
        finally:
            counting.remove()

    Role.hidden = hidden  # type: ignore[method-assign]


def never_end() -> None:
    build = assemble.build_engine

    def endless(*given: Any, **named: Any) -> Any:
        engine: Any = build(*given, **named)
        engine.stop_tokens = frozenset()
        return engine

    assemble.build_engine = endless


def time_reference() -> None:
    """DPO's reference reads all pairs before the first step; it belongs to the steps that learn from them."""
    plain = learning.with_reference

    def timed(*given: Any) -> Any:
        began = time.perf_counter()
        rows = plain(*given)
        REFERENCE["seconds"] = time.perf_counter() - began
        return rows

    learning.with_reference = timed


def main() -> None:
    asked = json.loads(sys.argv[1])
    folder = Path(asked["out"])
    shutil.rmtree(folder, ignore_errors=True)
    count_positions()
    time_reference()
    if asked["never_end"]:
        never_end()
    sys.argv = ["dressage", asked["verb"], *asked["settings"], "--out", str(folder)]
    try:
        dressage()
    except SystemExit as end:
        if end.code:
            raise
    rows = [row for row in read_metrics(folder) if row["step"]]
    clock = [0.0, *(row["seconds"] for row in rows)]
    steps = [after - before for before, after in pairwise(clock)]
    timed, last = steps[-asked["timed"] :], rows[-asked["timed"] :]
    reference = REFERENCE["seconds"] / asked["timed"]
    result: dict[str, Any] = {
        "seconds": fmean(timed) + reference,
        "steps": [round(seconds, 3) for seconds in steps],
        "rows": asked["rows"],
        # Of all steps, warm-up included: how much of what the learner computed was padding.
        "padding_share": 1 - COMPUTED["real"] / COMPUTED["positions"],
        "learner_tokens": fmean(row["tokens_per_second"] * seconds for row, seconds in zip(last, timed, strict=True)),
        "compute": str(compute_dtype("auto")).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": dict(versions()),
    }
    if reference:
        result["reference_seconds"] = reference
    for name in ("rollout", "score", "update"):
        if (key := f"time/{name}_seconds") in last[0]:
            result[f"{name}_seconds"] = fmean(row[key] for row in last)
    if "length/mean_tokens" in last[0]:
        result["answer_tokens"] = fmean(row["length/mean_tokens"] for row in last)
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
