"""What a decode step costs the host, call by call, and the GPU. The last line is JSON.

    python -m benchmarks.cuda.steps --model DIR

Sequences of 64 + 200 tokens, one and 64 of them, greedy; a step's time is the whole over 200, prompts included. Calls of the host are timed where
they run, on the worker's thread and the engine's, so they include waiting for each other's interpreter. The GPU's part is the recorded step, replayed
by itself, if the device records any.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from xllm_core import LLM, SamplingParams
from xllm_core.engine.scheduler import Scheduler
from xllm_core.errors import XllmError
from xllm_core.runtime.graphs import StepGraphs
from xllm_core.runtime.inputs import InputBuffers
from xllm_core.runtime.model_runner import ModelRunner

CALLS = (
    (Scheduler, "schedule"), (InputBuffers, "gather"), (StepGraphs, "_load"), (StepGraphs, "_refill"), (ModelRunner, "forward"),
    (ModelRunner, "sample"), (Scheduler, "update"),
)  # fmt: skip
INPUT_LEN, OUTPUT_LEN = 64, 200
REPLAYS = 30


def main() -> None:
    """Print a line per number of sequences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory or hub id")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda/cuda")
    parser.add_argument("--output-len", type=int, default=OUTPUT_LEN)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 64], metavar="N", help="sequences (default 1 64)")
    args = parser.parse_args()
    spent = {f"{kind.__name__}.{name}": timed(kind, name) for kind, name in CALLS}
    results = []
    with LLM(args.model, device=args.device, dtype=args.dtype, max_num_seqs=max(args.counts)) as llm:
        for count in args.counts:
            generate(llm, count, 8)
            for calls in spent.values():
                calls.clear()
            step_us = 1e6 * generate(llm, count, args.output_len) / args.output_len
            host = {name: round(1e6 * sum(calls) / args.output_len, 1) for name, calls in spent.items() if calls}
            gpu = replay_us(llm, count)
            results.append({"sequences": count, "step_us": round(step_us, 1), "host_us": host, "gpu_us": gpu})
            told = ", ".join(f"{name} {us:.0f}" for name, us in host.items())
            part = f"{gpu:.0f} us" if gpu else "not known"
            print(
                f"{count} sequences: {step_us:.0f} us a step; the GPU's part: {part}; the host's, in us: {told}",
                flush=True,
            )
    print(json.dumps({"model": args.model, "dtype": args.dtype, "rows": results}))


def timed(kind: type, name: str) -> list[float]:
    """From now on, the seconds of every call of a method."""
    call: Callable[..., Any] = getattr(kind, name)
    seconds: list[float] = []

    def measured(*arguments: Any, **named: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return call(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - started_s)

    setattr(kind, name, measured)
    return seconds


def generate(llm: LLM, count: int, output_len: int) -> float:
    """Seconds."""
    prompts = [{"prompt_token_ids": [1 + (7 * row + at) % 97 for at in range(INPUT_LEN)]} for row in range(count)]
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    started_s = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started_s


def replay_us(llm: LLM, count: int) -> float | None:
    """Of the graph that serves so many rows, replayed by itself; None where there is no GPU or no such graph."""
    import torch

    engine: Any = llm.processor.client.engine  # type: ignore[attr-defined]
    graphs = engine.executor._thread._driver.worker._runner.graphs
    buckets = [bucket for bucket in (graphs._recorded if graphs is not None else ()) if bucket >= count]
    found = graphs._recorded[min(buckets)] if buckets else None
    if found is None or not torch.cuda.is_available():
        return None
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found.graph.replay(count)
    begun.record()
    for _ in range(REPLAYS):
        found.graph.replay(count)
    ended.record()
    ended.synchronize()
    return round(1e3 * float(begun.elapsed_time(ended)) / REPLAYS, 1)


if __name__ == "__main__":
    try:
        main()
    except XllmError as error:
        sys.exit(str(error))
