"""Observers get step records in batches, on a thread of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One engine step. Durations are seconds on the thread that did the work; without overlap they add up to the step.

    started_s, forward_ended_s: `time.perf_counter` when scheduling began, and when the worker had made its last call of the forward. A
    step was planned while the one before it ran if it started before that one's forward had ended. is_replayed: from a recorded graph.
    kv_tokens: positions whose KV the rows read. attended: pairs of a new token and a position it sees.
    """

    step: int
    started_s: float
    schedule_s: float
    prepare_s: float
    forward_s: float
    sample_s: float
    emit_s: float
    forward_ended_s: float
    num_rows: int
    num_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int
    used_blocks: int
    total_blocks: int
    is_replayed: bool = False
    kv_tokens: int = 0
    attended: int = 0


class Observer(Protocol):
    """Never called on the step path; a slow observer loses records (counted), it never slows a step."""

    def observe(self, records: Sequence[StepRecord]) -> None:
        """Consecutive records, oldest first."""

    def close(self) -> None:
        """The engine stops; no record follows."""
