"""The table as a picture: a panel per workload, a bar per engine with its interval."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.comparison import Measured
from benchmarks.peers.table import TITLES

_OURS, _THEIRS = "#2f6fab", "#a9a9a9"


def draw(measured: Measured, title: str, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure  # its own canvas: no window, no global state

    names = [name for name in TITLES if measured.engines(name)]
    figure = Figure(figsize=(12, 1.0 + 2.6 * ((len(names) + 1) // 2)), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot((len(names) + 1) // 2, 2, i + 1)
        found = {engine: spread for engine in measured.engines(name) if (spread := measured.spread(name, engine))}
        ranked = sorted(found, key=lambda engine: found[engine].median)
        medians = [found[engine].median for engine in ranked]
        errors = [
            [found[engine].median - found[engine].low for engine in ranked],
            [found[engine].high - found[engine].median for engine in ranked],
        ]
        axes.barh(
            ranked,
            medians,
            xerr=errors,
            color=[_OURS if e.startswith("xllm") else _THEIRS for e in ranked],
            ecolor="#444444",
        )
        for y, engine in enumerate(ranked):
            axes.text(found[engine].high, y, f" {found[engine].median:.4g}", va="center", fontsize=8)
        axes.set_title(TITLES[name], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.12)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
