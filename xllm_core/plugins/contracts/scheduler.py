"""A scheduling policy: pure functions over snapshots. The core owns budgets, KV accounting and the loop; policies never subclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SequenceView:
    """A snapshot of one sequence. Times are monotonic seconds; tokens are counts.

    todo_tokens: known but not computed. arrival_order: 0 for the first that ever came, kept over preemptions.
    deadline_s: None until something asks for one. predicted_step_s: seconds of a step that computes `todo_tokens` of this sequence alone, as
    far as a step may go; None for a policy that does not say `uses_step_times`, and until enough steps have been measured.
    """

    request_id: str
    arrival_order: int
    arrival_s: float
    priority: int
    is_offline: bool
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    todo_tokens: int
    num_preemptions: int
    deadline_s: float | None = None
    predicted_step_s: float | None = None


class SchedulerPolicy(Protocol):
    """Called only when there is a choice: something waits, a chunk must be cut, or blocks ran out.

    A policy that has `uses_step_times = True` as well gets `SequenceView.predicted_step_s`, fitted from the steps measured so far.
    """

    is_static: bool
    """True if `order` depends on no clock and no progress: the core then calls it only when the queue changed."""

    uses_priority: bool
    """Whether `SequenceView.priority` is read. If not, a request that sets one is refused rather than served as if it had not."""

    def order(self, waiting: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """Indices of `waiting` in the order of admission; each exactly once. The head is never skipped by the core."""

    def chunk(self, view: SequenceView, budget_tokens: int) -> int:
        """Tokens of `view` to compute in this step: 1 .. min(todo, budget), or 0 to leave it for a later step."""

    def victims(self, running: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """Indices of `running` in the order in which they are given up when blocks run out; each exactly once."""
