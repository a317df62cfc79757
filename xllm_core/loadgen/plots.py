"""PNG plots of a run. matplotlib is imported when one is drawn; it comes with the extra `plots`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_core.errors import ConfigError
from xllm_core.loadgen.report import timeline
from xllm_core.loadgen.samples import Sample

_BLUE, _ORANGE, _GREY = "#2f6fab", "#c8641e", "#6b6b6b"


def check_matplotlib() -> None:
    """Raise ConfigError, with the command that helps, where there is no matplotlib. Call it before a long run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; run: pip install 'xllm-core[plots]'")


def draw(samples: Sequence[Sample], figures: Mapping[str, Any], title: str, folder: Path) -> list[Path]:
    """Write latency.png and timeline.png into `folder`, which is made; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    done = [sample for sample in samples if sample.outcome == "ok"]
    return [
        _latency(done, figures, title, folder / "latency.png"),
        _timeline(samples, figures, title, folder / "timeline.png"),
    ]


def _latency(done: Sequence[Sample], figures: Mapping[str, Any], title: str, path: Path) -> Path:
    from matplotlib.figure import Figure  # its own canvas: no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _histogram(left, [s.ttft_s for s in done if s.ttft_s is not None], figures["ttft_ms"], "requests")
    left.set_xlabel("time to first token (ms)")
    _histogram(right, [gap for sample in done for gap in sample.gaps_s], figures["itl_ms"], "chunks")
    right.set_xlabel("time between chunks (ms)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def _histogram(axes: Any, values_s: Sequence[float], spread: Mapping[str, float] | None, of_what: str) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    _tidy(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(of_what)
    if spread is None:
        axes.text(0.5, 0.5, "nothing measured", ha="center", va="center", transform=axes.transAxes, color=_GREY)
        return
    values = np.asarray(values_s) * 1e3
    num_bins = int(np.clip(np.sqrt(values.size) * 2, 10, 60))
    low, high = float(values.min()), float(values.max())
    is_wide = high > 20 * max(low, 0.01)
    if is_wide:  # a tail far from the middle would squeeze a linear axis into one bar
        values = np.maximum(values, 0.01)  # what came in one read has a gap of 0, which a logarithm cannot place
        bins = np.geomspace(max(low, 0.01), high, num_bins + 1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        margin = max(high - low, 0.1 * high, 0.01) * 0.02
        bins = np.linspace(low - margin, high + margin, num_bins + 1)
    counts, _, _ = axes.hist(values, bins=bins, color=_BLUE, alpha=0.85)
    if counts.max() > 200 and counts[counts > 0].min() * 100 < counts.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0.7)
    for part, style in (("p50", "-"), ("p99", "--")):
        at, label = max(spread[part], 0.01 if is_wide else 0.0), f"{part} {spread[part]:.4g} ms"
        axes.axvline(at, color=_ORANGE, linestyle=style, linewidth=1.5, label=label)
    axes.legend(frameon=False, fontsize=9)


def _timeline(samples: Sequence[Sample], figures: Mapping[str, Any], title: str, path: Path) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    end_s = max(((s.sent_s or 0.0) + (s.end_s or 0.0) for s in samples), default=0.0)
    usual_gap_s = figures["itl_ms"]["p50"] / 1e3 if figures["itl_ms"] else 0.0
    least_s = max(end_s / 120, usual_gap_s * 4)  # shorter than the server's steps, the plot would be a comb
    step_s = next((step for step in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0) if step >= least_s), 60.0)
    begins, tokens, running = timeline(samples, step_s)
    edges = np.append(begins, begins[-1] + step_s)
    upper.stairs(tokens, edges, fill=True, color=_BLUE, alpha=0.85)
    upper.set_ylabel("new tokens/s")
    lower.stairs(running, edges, fill=True, color=_ORANGE, alpha=0.6)
    lower.set_ylabel("requests under way")
    lower.set_xlabel(f"seconds since the start (means over {step_s:g} s)")
    for sample in samples:
        if sample.outcome == "failed" and sample.sent_s is not None:
            lower.axvline(sample.sent_s + (sample.end_s or 0.0), color="#b00020", linewidth=0.8, alpha=0.7)
    if any(sample.outcome == "failed" for sample in samples):
        lower.plot([], [], color="#b00020", linewidth=0.8, label="a request failed")
        lower.legend(frameon=False, fontsize=9)
    for axes in (upper, lower):
        _tidy(axes)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, edges[-1])
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
