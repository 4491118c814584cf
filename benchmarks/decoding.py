"""One step of decoding SmolLM2-135M, whole and taken apart: its products and its attention, as torch does and as we do.

    python benchmarks/decoding.py [--threads 2]

Random weights of the model's shapes, each way in turn, the median of several times, in milliseconds. Run it alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dressage import few_rows
from dressage.rollout.decoding import Decoding, Way, best_way

LAYERS, WIDTH, INNER, VOCABULARY, HEADS, KV_HEADS, DIM = 30, 576, 1536, 49_152, 9, 3, 64
SHAPES = (*[(WIDTH, WIDTH)] * 2, *[(KV_HEADS * DIM, WIDTH)] * 2, *[(INNER, WIDTH)] * 2, (WIDTH, INNER))


def milliseconds(ways: dict[str, Callable[[], object]], times: int = 9) -> str:
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(times + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                found[name].append(1e3 * (time.perf_counter() - began))
    return ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in found.items())


def products(rows: int, weights: list[Tensor]) -> str:
    x = {width: torch.randn(rows, width) for width in (WIDTH, INNER)}
    ways: dict[str, Callable[[], object]] = {"torch": lambda: [F.linear(x[w.shape[1]], w) for w in weights]}
    if few_rows.kernel() is not None:
        ways["few_rows.c"] = lambda: [few_rows.linear(x[w.shape[1]], w) for w in weights]
    return milliseconds(ways)


def exactness(rows: int) -> str:
    x, weight = torch.randn(rows, INNER), torch.randn(WIDTH, INNER)
    exact = x.double() @ weight.double().T
    ways = {"torch": F.linear(x, weight), "few_rows.c": few_rows.linear(x, weight)}
    return ", ".join(f"{name} {(found - exact).square().mean().sqrt():.1e}" for name, found in ways.items())


def attention(rows: int, tokens: int) -> str:
    query, mask = torch.randn(rows, HEADS, 1, DIM), torch.zeros(rows, 1, 1, tokens)
    keys, values = (torch.randn(rows, KV_HEADS, tokens, DIM) for _ in range(2))

    def copied(states: Tensor) -> Tensor:
        return states.repeat_interleave(HEADS // KV_HEADS, dim=1)

    attend = F.scaled_dot_product_attention
    return milliseconds(
        {
            "keys copied for each head": lambda: attend(query, copied(keys), copied(values), attn_mask=mask),
            "as they are": lambda: attend(query, keys, values, attn_mask=mask, enable_gqa=True),
        }
    )


def steps(model: LlamaForCausalLM, rows: int, tokens: int) -> str:
    """Each way goes on with answers of its own: the first step of a way has so many tokens before it."""
    prompts = [torch.randint(10, 40_000, (tokens,)).tolist() for _ in range(rows)]
    chosen = torch.randint(10, 40_000, (rows,))
    ways: dict[str, Callable[[], object]] = {}
    names: dict[str, Way] = {"transformers' cache": "plain", "as a tree": "as a tree", "next_token.c": "compiled"}
    for name, way in names.items():
        if way == "compiled" and best_way(model) != way:
            continue
        batch = Decoding(model, prompts, rows=rows, room=16, pad_token=0, way=way)
        batch.fill()
        ways[name] = partial(batch.advance, chosen)
    return milliseconds(ways)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, help="else torch's own number")
    if threads := options.parse_args().threads:
        torch.set_num_threads(threads)
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in SHAPES] + [torch.randn(VOCABULARY, WIDTH)]
    with torch.inference_mode(), few_rows.quick(nn.Identity()):
        for rows in (1, 2, 8, 16, 32, 64, few_rows.MOST):
            print(f"all products, {rows} rows: {products(rows, weights)} ms", flush=True)
        print(f"off by, {few_rows.MOST} rows of {INNER}: {exactness(few_rows.MOST)}")
        for rows, tokens in ((1, 512), (16, 112), (16, 512), (64, 112), (64, 512)):
            print(f"one layer's attention, {rows} answers of {tokens} tokens: {attention(rows, tokens)} ms", flush=True)
    del weights
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.inference_mode(), few_rows.quick(model):
        for rows in (1, 4, 16, 32, 64, few_rows.MOST):
            print(f"a whole step, {rows} answers of 80 tokens: {steps(model, rows, 80)} ms", flush=True)


if __name__ == "__main__":
    main()
