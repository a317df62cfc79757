"""What is printed at the end: a block per workload, then a line per target."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.comparison import CLAIMS, SIZE, START, Measured, Spread, Verdict, digits
from benchmarks.peers.engines import ENGINES
from benchmarks.peers.workloads import WORKLOADS

TITLES = {
    **{work.name: f"{work.title} ({work.unit})" for work in WORKLOADS},
    START: "start, process to first token (s)",
    SIZE: "installed size of its own distributions (MB)",
}
_ORDER = [engine.name for engine in ENGINES]
_AGAINST = {engine.name: engine.against for engine in ENGINES}


def render(measured: Measured) -> list[str]:
    """All blocks, then who is absent."""
    lines: list[str] = []
    for name in TITLES:
        if measured.engines(name):
            lines += [*block(measured, name), ""]
    return lines + [f"absent  {engine}: {reason}" for engine, reason in measured.absent.items()]


def verdicts(measured: Measured) -> list[str]:
    """A line per target; of workloads that were not asked for, none."""
    return [verdict_line(measured.verdict(claim)) for claim in CLAIMS if measured.engines(claim.workload)]


def block(measured: Measured, workload: str) -> list[str]:
    """Engines of one workload, each with its figure and what ours is beside it."""
    disturbed, total = measured.num_disturbed(workload)
    note = ""
    if disturbed:
        note = (
            f"; {disturbed} of {total} rounds disturbed by other processes, "
            + ("all" if disturbed == total else "not")
            + " counted"
        )
    cells = [("", "median [95 %]", "of the limit", "ours / its", "rounds", "beside")]
    for engine in sorted(measured.engines(workload), key=_ORDER.index):
        figure = measured.spread(workload, engine)
        against = _AGAINST[engine]
        ratio = measured.ratio(workload, against, engine) if against else None
        cells.append(
            (engine, _cell(figure), _cell(measured.share(workload, engine)), _cell(ratio), str(figure.num if figure else 0),
             _details(measured, workload, engine))
        )  # fmt: skip
    return [f"{TITLES[workload]}{note}", *columns(cells)]


def verdict_line(verdict: Verdict) -> str:
    """Met, missed or absent, what, and the target."""
    claim = verdict.claim
    what = f"{claim.workload}: {claim.ours}" + (f" / {claim.theirs}" if claim.theirs else "")
    what += {"value": "", "share": ", share of the limit", "ttft_p50_ms": ", time to first token p50"}[claim.of]
    end = "lower end" if claim.must == "at least" else "upper end"
    found = str(verdict.spread) if verdict.spread else verdict.reason
    doubt = "; every round was disturbed" if verdict.is_disturbed else ""
    return f"{verdict.word:<6}  {what}: {found} (target: {end} {claim.must} {claim.target:g}){doubt}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned; trailing blanks cut."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _cell(figure: Spread | None) -> str:
    return "-" if figure is None else str(figure)


def _details(measured: Measured, workload: str, engine: str) -> str:
    names = dict.fromkeys(name for row in measured.of(workload, engine) for name in row.details)
    found = ((name, measured.spread(workload, engine, name)) for name in names)
    return ", ".join(f"{name} {digits(figure.median)}" for name, figure in found if figure)
