"""From turns to figures: medians with intervals, ratios of pairs, shares of the limit, and which targets are met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.pairs import summarise

START, SIZE = "start", "size"
"""Workloads beside those of `workloads.py`: seconds from a process's start to its first token, and MB on the disk."""


@dataclass(frozen=True, slots=True)
class Row:
    """One engine's turn. limit: of the value at the probes beside this turn, None where there is none.

    foreign_cores: what others used meanwhile. is_clean: so little, in the whole round, that the round counts.
    read_gb_s, peak_gflops: probed before and after this turn.
    """

    workload: str
    round: int
    engine: str
    value: float
    details: dict[str, float] = field(default_factory=dict)
    limit: float | None = None
    foreign_cores: float = 0.0
    is_clean: bool = True
    read_gb_s: tuple[float, float] = (0.0, 0.0)
    peak_gflops: tuple[float, float] = (0.0, 0.0)

    def figure(self, name: str) -> float | None:
        """The value, or a detail by its name."""
        return self.value if name == "value" else self.details.get(name)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its 95 % bootstrap interval over so many rounds."""

    median: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{digits(self.median)} [{digits(self.low)}, {digits(self.high)}]"


@dataclass(frozen=True, slots=True)
class Claim:
    """A target. theirs: the median of ours / theirs; of "share": of the limit; neither: the figure itself.

    must: on which side of `target` the whole interval has to lie.
    """

    workload: str
    ours: str
    target: float
    theirs: str = ""
    of: Literal["value", "share", "ttft_p50_ms"] = "value"
    must: Literal["at least", "at most"] = "at least"


CLAIMS = (
    Claim("single", "xllm", 1.08, "llama-bf16"),
    Claim("single", "xllm", 0.80, of="share"),
    Claim("single", "xllm-process", 0.80, of="share"),
    Claim("prefill", "xllm-process", 1.0, "openvino"),
    Claim("prefill", "xllm-process", 0.78, of="share"),
    Claim("burst", "xllm-process", 1.45, "openvino"),
    Claim("burst", "xllm", 1.6, "vllm"),
    Claim("burst", "xllm-process", 0.70, of="share"),
    Claim("burst", "xllm-int8", 2.2, "vllm"),
    Claim("clients", "xllm", 1.45, "vllm"),
    Claim("clients", "xllm", 0.95, "vllm", of="ttft_p50_ms", must="at most"),
    Claim("prefix", "xllm", 22, must="at most"),
    Claim("prefix", "xllm-process", 22, must="at most"),
    Claim("single", "xllm-q4_1", 1.6, "llama-q4_1"),
    Claim("single", "xllm-int8", 1.4, "llama-q8_0"),
    Claim(START, "xllm", 3, must="at most"),
    Claim(SIZE, "xllm", 30, must="at most"),
)
"""The table of targets. A row whose engine is absent is reported as such."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a claim. spread: None where it could not be measured, with the reason. is_disturbed: there was no clean round."""

    claim: Claim
    spread: Spread | None
    reason: str = ""
    is_disturbed: bool = False

    @property
    def is_met(self) -> bool:
        """The far end of the interval reaches the target."""
        if self.spread is None:
            return False
        return (
            self.spread.low >= self.claim.target
            if self.claim.must == "at least"
            else self.spread.high <= self.claim.target
        )

    @property
    def word(self) -> str:
        """As printed."""
        return "absent" if self.spread is None else "met" if self.is_met else "MISSED"


class Measured:
    """All rows, asked for figures. Rounds that others disturbed are left out wherever a clean one is left."""

    def __init__(self, rows: Iterable[Row], absent: dict[str, str] | None = None) -> None:
        self.rows = list(rows)
        self.absent = dict(absent or {})

    def of(self, workload: str, engine: str) -> list[Row]:
        """That count."""
        rows = [row for row in self.rows if row.workload == workload]
        clean = [row for row in rows if row.is_clean]
        return [row for row in clean or rows if row.engine == engine]

    def engines(self, workload: str) -> list[str]:
        """That were measured, in the order of their first turn by name."""
        return sorted({row.engine for row in self.rows if row.workload == workload})

    def num_disturbed(self, workload: str) -> tuple[int, int]:
        """Rounds that were disturbed, of how many."""
        rounds = {row.round: row.is_clean for row in self.rows if row.workload == workload}
        return sum(not is_clean for is_clean in rounds.values()), len(rounds)

    def spread(self, workload: str, engine: str, figure: str = "value") -> Spread | None:
        """Of an engine's figure."""
        return spread([value for row in self.of(workload, engine) if (value := row.figure(figure)) is not None])

    def share(self, workload: str, engine: str) -> Spread | None:
        """Of the limit."""
        rows = [(row.value, row.limit) for row in self.of(workload, engine) if row.limit]
        return spread([value for value, _ in rows], [limit for _, limit in rows if limit])

    def ratio(self, workload: str, ours: str, theirs: str, figure: str = "value") -> Spread | None:
        """Ours / theirs over the rounds that both have."""
        mine = {row.round: row.figure(figure) for row in self.of(workload, ours)}
        other = {row.round: row.figure(figure) for row in self.of(workload, theirs)}
        pairs = [(a, b) for key, a in mine.items() if a is not None and (b := other.get(key))]
        return spread([a for a, _ in pairs], [b for _, b in pairs])

    def verdict(self, claim: Claim) -> Verdict:
        """Of one claim."""
        for engine in (claim.ours, claim.theirs):
            if engine and not self.of(claim.workload, engine):
                return Verdict(
                    claim, None, f"{engine} is absent" if engine in self.absent else f"{engine} was not asked for"
                )
        if claim.theirs:
            found = self.ratio(claim.workload, claim.ours, claim.theirs, claim.of)
        elif claim.of == "share":
            found = self.share(claim.workload, claim.ours)
        else:
            found = self.spread(claim.workload, claim.ours, claim.of)
        num, total = self.num_disturbed(claim.workload)
        return Verdict(claim, found, "" if found else "no round has the figure", is_disturbed=num == total)

    def as_json(self) -> dict[str, Any]:
        """Every row, and what was made of them."""
        return {
            "verdicts": [_plain(self.verdict(claim)) for claim in CLAIMS],
            "absent": self.absent,
            "rows": [asdict(row) for row in self.rows],
        }


def _plain(verdict: Verdict) -> dict[str, Any]:
    plain = asdict(verdict)
    return {**plain.pop("claim"), **plain, "verdict": verdict.word}


def spread(values: Sequence[float], over: Sequence[float] | None = None) -> Spread | None:
    """The median of values, or of their ratios to `over`; None for none."""
    if not values:
        return None
    found = summarise(values, over if over is not None else [1.0] * len(values))
    return Spread(found.median, found.low, found.high, len(values))


def digits(value: float) -> str:
    """Three that matter, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
