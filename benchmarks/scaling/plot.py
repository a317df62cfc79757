"""The curves as a picture: measured with intervals, and the limits of the machine beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling.figures import UNITS, Point, fit, points
from benchmarks.scaling.points import CONTEXT, CURVES, DECODE, PREFILL, Sample

_OURS, _LIMIT, _LINE = "#2f6fab", "#a9a9a9", "#c8641e"
_TITLES = {
    DECODE: "decode, new tok/s by sequences at once",
    PREFILL: "prefill, tok/s by prompt",
    CONTEXT: "ms for a new token by context",
}


def why_no_picture() -> str:
    """Empty where matplotlib is there; else what is missing and the command that brings it. Ask before a long run."""
    if importlib.util.find_spec("matplotlib") is not None:
        return ""
    return "the picture needs matplotlib, which is not installed; run: pip install 'xllm-core[plots]', or do without by --no-picture"


def draw(samples: Sequence[Sample], fitted: Sequence[int], title: str, path: Path) -> None:
    """Write a PNG. fitted: contexts that the line goes through; none draws no line."""
    from matplotlib.figure import Figure  # its own canvas: no window, no global state

    curves = [curve for curve in CURVES if any(sample.curve == curve for sample in samples)]
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for i, curve in enumerate(curves):
        axes = figure.add_subplot(1, len(curves), i + 1)
        _curve(axes, points(samples, curve))
        if curve == CONTEXT and len(fitted) > 1:
            _line(axes, [sample for sample in samples if sample.curve == curve], fitted)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _curve(axes: Any, found: Sequence[Point]) -> None:
    """ms by the context, tokens per second by anything else."""
    curve, sizes = found[0].curve, [point.size for point in found]
    if all(point.share is not None for point in found):
        limits = [_at_limit(point) for point in found]
        axes.plot(sizes, limits, color=_LIMIT, linestyle="--", marker=".", label="limit of this machine")
    drawn = [point.ms if curve == CONTEXT else point.value for point in found]
    errors = [[s.median - s.low for s in drawn], [s.high - s.median for s in drawn]]
    axes.errorbar(
        sizes, [s.median for s in drawn], yerr=errors, color=_OURS, ecolor="#444444", marker="o", markersize=4, capsize=2, label="measured"
    )  # fmt: skip
    if curve != CONTEXT:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    else:
        axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(_TITLES[curve], fontsize=9)
    axes.set_xlabel(UNITS[curve], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _at_limit(point: Point) -> float:
    assert point.limit_ms is not None
    at_ms = point.limit_ms.median
    return at_ms if point.curve == CONTEXT else point.value.median * point.ms.median / at_ms


def _line(axes: Any, samples: Sequence[Sample], fitted: Sequence[int]) -> None:
    line = fit((sample.context, sample.seconds) for sample in samples if sample.size in fitted)
    ends = (0.0, max(sample.context for sample in samples))
    axes.plot(
        ends,
        [line.at(x) * 1e3 for x in ends],
        color=_LINE,
        linewidth=1,
        label=f"line through {fitted[0]:,} to {fitted[-1]:,}",
    )
