"""Ratios side by side: two arms in turns, the median of the ratios with an interval."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.machine import SETTLE_S

_RESAMPLES = 5000


@dataclass(frozen=True, slots=True)
class Ratio:
    """ours / theirs over interleaved pairs. low, high: 95 % bootstrap interval of the median."""

    median: float
    low: float
    high: float
    ours: tuple[float, ...]
    theirs: tuple[float, ...]


def interleave(ours: Callable[[int], float], theirs: Callable[[int], float], num_pairs: int) -> Ratio:
    """Run pairs; each arm returns a figure of which more is better, and has `SETTLE_S` after its turn.

    Which arm goes first alternates, so that drift hits both alike.
    """
    a: list[float] = []
    b: list[float] = []
    for i in range(num_pairs):
        for arm, kept in ((ours, a), (theirs, b)) if i % 2 == 0 else ((theirs, b), (ours, a)):
            kept.append(arm(i))
            time.sleep(SETTLE_S)
    return summarise(a, b)


def summarise(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The median ratio and its interval."""
    ratios = [x / y for x, y in zip(ours, theirs, strict=True)]
    chance = random.Random(0)
    medians = sorted(_median(chance.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES)]
    return Ratio(_median(ratios), low, high, tuple(ours), tuple(theirs))


def _median(values: Sequence[float]) -> float:
    ranked = sorted(values)
    middle = len(ranked) // 2
    return ranked[middle] if len(ranked) % 2 else (ranked[middle - 1] + ranked[middle]) / 2
