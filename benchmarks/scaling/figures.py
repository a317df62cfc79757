"""From samples to what is printed: medians with intervals, shares of the limit, and whether a token's cost grows as attention does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers.comparison import Spread, digits, spread
from benchmarks.scaling.points import CONTEXT, CURVES, DECODE, PREFILL, Sample

MOST = 1.10
"""How far above the line a long context may lie, the whole interval: five times the scatter of steps on a quiet machine."""

FITTED = 4
"""The line goes through contexts up to the longest divided by this."""


@dataclass(frozen=True, slots=True)
class Point:
    """A size of a curve over all rounds. value: tokens per second; ms: of a step, or to the first token; gain: value over that of the
    curve's first size in the same round; share: of the limit; limit_ms: the least time; limited_by: memory, products, or both in turns."""

    curve: str
    size: int
    value: Spread
    ms: Spread
    gain: Spread | None
    share: Spread | None
    limit_ms: Spread | None
    limited_by: str


@dataclass(frozen=True, slots=True)
class Line:
    """seconds(context) = fixed_s + per_token_s * context."""

    fixed_s: float
    per_token_s: float

    def at(self, context: float) -> float:
        """Seconds."""
        return self.fixed_s + self.per_token_s * context


@dataclass(frozen=True, slots=True)
class Growth:
    """What became of the claim. beyond: measured over extrapolated, per context that the line was not fitted to. kv_gb_s: at which further
    positions are read, by the slope of all contexts; None where they cost nothing that can be seen."""

    fitted: tuple[int, ...]
    beyond: dict[int, Spread]
    per_token_s: Spread
    kv_gb_s: float | None

    @property
    def is_met(self) -> bool:
        """All whole intervals."""
        return all(found.high <= MOST for found in self.beyond.values())


def fit(points: Iterable[tuple[float, float]]) -> Line:
    """Least squares through (context, seconds). A line that would fall is taken as level: less cost for more context is noise."""
    found = list(points)
    mean_x, mean_y = (sum(values) / len(found) for values in zip(*found, strict=True))
    wide = sum((x - mean_x) ** 2 for x, _ in found)
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in found) / wide)
    return Line(mean_y - slope * mean_x, slope)


def growth(samples: Sequence[Sample], position_bytes: int | None = None) -> Growth | None:
    """Round by round a line through the shorter contexts, extrapolated. None where fewer than two contexts are short, or none is long.

    position_bytes: of the KV of a position, where it is known.
    """
    rounds: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.curve == CONTEXT:
            rounds.setdefault(sample.round, []).append(sample)
    sizes = sorted({sample.size for found in rounds.values() for sample in found})
    fitted = tuple(size for size in sizes if size * FITTED <= sizes[-1])
    if len(fitted) < 2:
        return None
    beyond: dict[int, tuple[list[float], list[float]]] = {size: ([], []) for size in sizes if size not in fitted}
    slopes = []
    for found in rounds.values():
        line = fit((sample.context, sample.seconds) for sample in found if sample.size in fitted)
        slopes.append(fit((sample.context, sample.seconds) for sample in found).per_token_s)
        for sample in found:
            if sample.size in beyond:
                beyond[sample.size][0].append(sample.seconds)
                beyond[sample.size][1].append(line.at(sample.context))
    slope = _spread(slopes)
    rate = position_bytes / slope.median / 1e9 if position_bytes and slope.median > 0 else None
    return Growth(fitted, {size: _spread(*pair) for size, pair in beyond.items()}, slope, rate)


def verdict(found: Growth | None) -> str:
    """One line: met or missed."""
    claim = "a token's cost grows with its context as attention does, and no faster"
    if found is None:
        return f"absent  {claim}: no line can be drawn through so few contexts"
    ratios = ", ".join(f"{ratio} of it at {size:,}" for size, ratio in sorted(found.beyond.items(), reverse=True))
    rate = f", its KV read at {digits(found.kv_gb_s)} GB/s" if found.kv_gb_s else ""
    line = f"against the line through {found.fitted[0]:,} to {found.fitted[-1]:,} tokens {ratios}"
    return (
        f"{'met   ' if found.is_met else 'MISSED'}  {claim}: {line} (target: intervals' upper ends <= {MOST:.2f}); "
        f"1,000 more positions cost {_scaled(found.per_token_s, 1e6)} ms{rate}"
    )


def points(samples: Sequence[Sample], curve: str) -> list[Point]:
    """A curve's, by size."""
    of_curve = [sample for sample in samples if sample.curve == curve]
    sizes = sorted({sample.size for sample in of_curve})
    first = {sample.round: sample.value for sample in of_curve if sample.size == sizes[0]}
    found = []
    for size in sizes:
        mine = [sample for sample in of_curve if sample.size == size]
        paired = [sample for sample in mine if sample.round in first]
        limits = [sample.limit for sample in mine if sample.limit is not None]
        found.append(
            Point(
                curve, size, value=_spread([s.value for s in mine]), ms=_spread([s.seconds * 1e3 for s in mine]),
                gain=spread([s.value for s in paired], [first[s.round] for s in paired]),
                share=spread([share for s in mine if (share := s.share) is not None]),
                limit_ms=spread([limit.seconds * 1e3 for limit in limits]), limited_by="/".join(sorted({limit.by for limit in limits})),
            )
        )  # fmt: skip
    return found


def table(found: Sequence[Point]) -> list[str]:
    """A head and a line for each point of a curve; nothing for no points."""
    if not found:
        return []
    curve, least = found[0].curve, found[0].size
    lines = [
        TITLES[curve],
        _row(UNITS[curve], "tok/s", "ms", f"times {least:,}'s tok/s", "share of the limit", "limit"),
    ]
    for point in found:
        limit = f"{digits(point.limit_ms.median)} ms, {point.limited_by}" if point.limit_ms else "not known"
        cells = (point.value, point.ms, point.gain or "-", point.share or "-")
        value, ms, gain, share = map(str, cells)
        lines.append(_row(f"{point.size:,}", value, ms, gain, share, limit))
    return [*lines, ""]


def as_json(samples: Sequence[Sample], found: Growth | None) -> dict[str, Any]:
    """All samples, and what was made of them."""
    told = None if found is None else {**asdict(found), "is_met": found.is_met, "target": MOST}
    made = [asdict(point) for curve in CURVES for point in points(samples, curve)]
    return {"points": made, "growth": told, "verdict": verdict(found), "samples": [asdict(s) for s in samples]}


UNITS = {DECODE: "sequences", PREFILL: "prompt", CONTEXT: "context"}
"""What the sizes of a curve count."""

TITLES = {
    DECODE: "decode by the batch: new tokens of all sequences together; ms of a step",
    PREFILL: "prefill by the prompt: its tokens; ms to the first new one",
    CONTEXT: "decode by the context: new tokens of one sequence; ms of each",
}


def _row(size: str, value: str, ms: str, gain: str, share: str, limit: str) -> str:
    return f"{size:>10}  {value:<22}  {ms:<24}  {gain:<22}  {share:<22}  {limit}".rstrip()


def _scaled(found: Spread, factor: float) -> Spread:
    return Spread(found.median * factor, found.low * factor, found.high * factor, found.num)


def _spread(values: Sequence[float], over: Sequence[float] | None = None) -> Spread:
    found = spread(values, over)
    assert found is not None  # there is a value, since there is a size
    return found
