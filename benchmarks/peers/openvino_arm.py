"""OpenVINO GenAI in a process: a load per line of standard input, its figures per line of standard output, as `benchmarks.arms` speaks.

Runs in OpenVINO's environment, so it imports nothing of ours.

    python openvino_arm.py MODEL.gguf MAX_SEQS KV_BYTES THREADS
"""

from __future__ import annotations

import json
import os
import random
import sys
import time

import numpy as np
import openvino
import openvino_genai as genai


def main() -> None:
    """The child: a round per line."""
    path, max_seqs, kv_bytes, threads = sys.argv[1], *map(int, sys.argv[2:5])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints must not come between the answers
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = max(1, kv_bytes >> 30)  # GB
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 2048, max_seqs
    scheduler.enable_prefix_caching = scheduler.dynamic_split_fuse = True
    pipe = genai.LLMPipeline(
        path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads, KV_CACHE_PRECISION="bf16"
    )
    for line in sys.stdin:
        load = json.loads(line)
        answers.write(json.dumps(play(pipe, load)) + "\n")
        answers.flush()


def play(pipe: genai.LLMPipeline, load: dict[str, int]) -> dict[str, object]:
    """One load: all requests at once, each with exactly as many new tokens. Of a batch the time to the first token is the mean."""
    count, new = load["num_prompts"], load["output_len"]
    shared = draw(f"prefix {load.get('prefix_seed', 0)}", load.get("prefix_len", 0))
    own = load["input_len"] - len(shared)
    ids = np.array([shared + draw(f"{load['seed']} {i}", own) for i in range(count)], dtype=np.int64)
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new
    config.ignore_eos, config.do_sample = True, False
    inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    started_s = time.perf_counter()
    result = pipe.generate(inputs, config)
    elapsed_s = time.perf_counter() - started_s
    if [len(tokens) for tokens in result.tokens] != [new] * count:
        raise RuntimeError(f"{[len(tokens) for tokens in result.tokens]} new tokens, {new} were asked for")
    first_ms = elapsed_s * 1e3 if new == 1 else result.perf_metrics.get_ttft().mean
    return {"tok_s": count * new / elapsed_s, "ttft_ms": [first_ms]}


def draw(seed: str, count: int) -> list[int]:
    """Random token ids."""
    chance = random.Random(seed)
    return [chance.randrange(1000, 40000) for _ in range(count)]


if __name__ == "__main__":
    main()
