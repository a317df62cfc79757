"""Observers get step records in batches, on a thread of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One engine step. Times are seconds; the split adds up to the step."""

    step: int
    started_s: float
    schedule_s: float
    prepare_s: float
    forward_s: float
    sample_s: float
    emit_s: float
    num_rows: int
    num_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int
    used_blocks: int
    total_blocks: int


class Observer(Protocol):
    """Never called on the step path; a slow observer loses records (counted), it never slows a step."""

    def observe(self, records: Sequence[StepRecord]) -> None:
        """Consecutive records, oldest first."""

    def close(self) -> None:
        """The engine stops; no record follows."""
