"""What a learning pass really takes of memory for each token, where arena.c puts tensors and where the C library does.

    python benchmarks/kept.py [--layers N] [--all-weights] [--plain]

SmolLM2-135M under an adapter, or all of it, texts of 80 tokens that share nothing; each number of texts in a process of
its own, four passes forward and backward, the last three looked at. Prints gigabytes above the loaded model, and by
least squares how many times the numbers that are kept (`Reader.kept_bytes` for KEPT = 1) that is: KEPT in
training/cost.py is from here. --plain: as much as transformers' own layers keep. Linux; memory does not care what else
runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

TEXTS, LENGTH = (2, 4, 8, 16), 80


def measure(texts: int, arena: bool, lora: dict[str, int] | None, plain: bool) -> float:
    """Gigabytes that this process takes above those of the loaded model."""
    import torch

    from dressage.assemble import build_role, load_backbone
    from dressage.config import LoraConfig
    from dressage.models.scoring import score_tokens
    from dressage.monitor import memory
    from dressage.settings import ModelConfig

    torch.set_num_threads(1)
    if not arena:
        memory.use_arena = lambda: None
    memory.keep_freed_memory()
    if memory.has_arena() != arena:
        raise SystemExit("arena.c was not built, or cannot be used here")
    backbone = load_backbone(ModelConfig(name="packaged", dtype="float32"))
    role, before = build_role(backbone, "policy", lora and LoraConfig(**lora), seed=0), memory.rss_gb()
    if plain:
        vars(backbone)["frugal_parts"] = []
    tokens = torch.randint(10, 40_000, (texts, LENGTH), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    wanted = real & (torch.arange(LENGTH) >= LENGTH // 2)
    taken = []
    for _ in range(4):
        scores = score_tokens(role, tokens, real, wanted, entropy=True)
        taken.append(memory.rss_gb() - before)  # the most is between the two halves
        scores.logprobs.sum().backward()
        del scores
    return max(taken[1:])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--layers", type=int, help="that the adapter reaches; else all")
    options.add_argument("--all-weights", action="store_true", help="instead of an adapter")
    options.add_argument("--plain", action="store_true", help="without models/frugal.py")
    options.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        print(measure(*given.one))
        return
    from dressage.config import LoraConfig
    from dressage.monitor import memory
    from dressage.settings import ModelConfig
    from dressage.training.cost import KEPT, Reader, shape_of

    lora = None if given.all_weights else {"rank": 16, "alpha": 32} | ({"layers": given.layers} if given.layers else {})
    reader = Reader(shape_of(ModelConfig(name="packaged", dtype="float32")), lora and LoraConfig(**lora))
    for arena in (False, True):
        taken = []
        for texts in TEXTS:
            command = [sys.executable, __file__, "--one", json.dumps([texts, arena, lora, given.plain])]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            taken.append(float(ran.stdout.split()[-1]))
        slope = statistics.linear_regression([texts * LENGTH for texts in TEXTS], taken).slope * 1e9
        each = reader.kept_bytes / KEPT[memory.has_arena()]
        told = ", ".join(f"{texts * LENGTH}: {gb:.2f}" for texts, gb in zip(TEXTS, taken, strict=True))
        print(
            f"{'arena.c' if arena else 'C library':9}  {told} GB; {slope / 1e6:.2f} MB a token,"
            f" {slope / each:.2f} x what is kept (KEPT: {KEPT[arena]})"
        )


if __name__ == "__main__":
    main()
