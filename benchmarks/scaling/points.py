"""The points of the curves, and how one of them is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from benchmarks.arms import Arm
from benchmarks.machine import SETTLE_S, peak_gflops, read_bandwidth_gb_s
from benchmarks.scaling.costs import Costs, Limit

DECODE, PREFILL, CONTEXT = "decode", "prefill", "context"
CURVES = (DECODE, PREFILL, CONTEXT)
BATCH_PROMPT = 32

Step = Sequence[float]
"""Of `Arm.rounds`: end of the forward in seconds, rows, tokens, KV positions read."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured. batches: sequences at once. prompts: tokens. contexts: tokens, the new ones included. output_len: of each decode."""

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    output_len: int

    def of(self, curve: str) -> tuple[int, ...]:
        """The sizes along a curve."""
        return {DECODE: self.batches, PREFILL: self.prompts, CONTEXT: self.contexts}[curve]


LONG = Sizes(
    (1, 2, 4, 8, 16, 32, 64), (32, 64, 128, 256, 512, 1024, 2048, 4096), (128, 512, 1024, 2048, 4096, 8192), 32
)
QUICK = Sizes((1, 2, 4), (32, 64, 128), (32, 64, 128, 256), 8)


@dataclass(frozen=True, slots=True)
class Sample:
    """One point in one round. seconds: of a decode step, or to a prompt's first token; value: what is drawn, tokens per second.

    context: positions that a decode step read per sequence, in the mean. limit: at the probes around this curve in this round; None where
    it is not known. read_gb_s, peak_gflops: those probes, the mean of before and after.
    """

    curve: str
    size: int
    round: int
    seconds: float
    value: float
    context: float
    limit: Limit | None
    read_gb_s: float
    peak_gflops: float

    @property
    def share(self) -> float | None:
        """Of the limit; 1 is as fast as this machine can be."""
        return self.limit.seconds / self.seconds if self.limit is not None else None


def decode_steps(steps: Sequence[Step], batch: int) -> tuple[float, float]:
    """Mean seconds and mean context of the steps in which all sequences decode. Raises RuntimeError where there are not two in a row."""
    whole = [step for step in steps if step[1] == step[2] == batch]
    if len(whole) < 2:
        raise RuntimeError(
            f"of {len(steps)} steps only {len(whole)} decoded all {batch} sequences at once; leave out --only {DECODE}, or free memory for KV"
        )
    first, *later = whole
    return (later[-1][0] - first[0]) / len(later), sum(step[3] for step in later) / len(later) / batch


def rotated(sizes: Sequence[int], number: int) -> list[int]:
    """Who goes first moves on from round to round, so that drift hits no size alone."""
    at = number % len(sizes) if sizes else 0
    return [*sizes[at:], *sizes[:at]]


@dataclass(slots=True)
class Bench:
    """Plays rounds on one engine. costs: None where limits are not known. sizes: `fit` cuts them to the engine."""

    arm: Arm
    costs: Costs | None
    sizes: Sizes
    samples: list[Sample] = field(default_factory=list)
    seeds: Iterator[int] = field(default_factory=lambda: count(1))
    probe: Callable[[], tuple[float, float]] = lambda: (read_bandwidth_gb_s(), peak_gflops())

    def fit(self, max_num_seqs: int) -> list[str]:
        """Ask the engine how much it can hold and drop what does not fit; says what was dropped, a line for each curve."""
        self.arm.round(1, next(self.seeds), input_len=8, output_len=2)
        told = self.arm.rounds[-1]
        longest, room = int(told["max_model_len"]), int(told["kv_tokens"])
        each = BATCH_PROMPT + self.sizes.output_len
        fits: dict[str, Callable[[int], bool]] = {
            DECODE: lambda n: n <= max_num_seqs and each <= longest and n * each <= room,
            PREFILL: lambda n: n + 1 <= min(longest, room),
            CONTEXT: lambda n: self.sizes.output_len < n <= min(longest, room),
        }
        kept = {curve: tuple(filter(fits[curve], self.sizes.of(curve))) for curve in CURVES}
        lines = [
            f"{curve}: without {', '.join(f'{n:,}' for n in dropped)}; the model takes {longest:,} tokens, the KV pool holds {room:,}"
            for curve in CURVES
            if (dropped := [n for n in self.sizes.of(curve) if n not in kept[curve]])
        ]
        self.sizes = Sizes(kept[DECODE], kept[PREFILL], kept[CONTEXT], self.sizes.output_len)
        return lines

    def play_round(self, number: int, curves: Sequence[str], *, on_point: Callable[[], object] = lambda: None) -> None:
        """Every size of these curves once. Round -1 warms up, and puts the long contexts into the prefix cache; it is not kept."""
        before = self.probe()
        for curve in curves:
            played = []
            for size in rotated(self.sizes.of(curve), number):
                played.append((size, *self._play(curve, size)))
                on_point()
            time.sleep(SETTLE_S)
            after = self.probe()
            read, peak = ((a + b) / 2 for a, b in zip(before, after, strict=True))
            before = after
            if number >= 0:
                self.samples += [self._sample(curve, *point, number, read, peak) for point in played]

    def _play(self, curve: str, size: int) -> tuple[float, float]:
        """Seconds and context of one point."""
        seed = next(self.seeds)
        if curve == PREFILL:
            self.arm.round(1, seed, input_len=size, output_len=1)
            return float(self.arm.rounds.pop()["ttft_ms"][0]) / 1e3, float(size)
        batch, output_len = (size, self.sizes.output_len) if curve == DECODE else (1, self.sizes.output_len)
        load: dict[str, Any] = {"input_len": BATCH_PROMPT}
        if (
            curve == CONTEXT
        ):  # one text, of which shorter contexts are the beginning: the prefix cache has it after the first round
            load = {"input_len": size - output_len, "prefix_len": size - output_len, "prefix_seed": 0}
        self.arm.round(batch, seed, output_len=output_len, **load)
        return decode_steps(self.arm.rounds.pop()["steps"], batch)

    def _sample(
        self, curve: str, size: int, seconds: float, context: float, number: int, read: float, peak: float
    ) -> Sample:
        batch = size if curve == DECODE else 1
        limit = None
        if self.costs is not None:
            rates = read * 1e9, peak * 1e9
            limit = self.costs.prefill(size, *rates) if curve == PREFILL else self.costs.decode(batch, context, *rates)
        tokens = size if curve == PREFILL else batch
        return Sample(curve, size, number, seconds, tokens / seconds, context, limit, read, peak)
