"""Shortest job first, with ageing. A `SchedulerPolicy`."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_core.plugins import SequenceView


class ShortestJobFirst:
    """Admits whoever has the least left, less what waiting is worth; of equals the first to come. The longest gives way when blocks run out.

    Source: shortest remaining processing time, L. Schrage, Operations Research 16 (1968); ageing keeps it from starving long jobs.
    """

    is_static = False  # waiting time moves the order
    uses_priority = False

    def __init__(self, ageing_tokens_per_s: float) -> None:
        self._ageing_tokens_per_s = ageing_tokens_per_s

    def order(self, waiting: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """By effective length."""
        return sorted(range(len(waiting)), key=lambda i: (self._length(waiting[i], now_s), waiting[i].arrival_order))

    def chunk(self, view: SequenceView, budget_tokens: int) -> int:
        """As much as the budget leaves."""
        return min(view.todo_tokens, budget_tokens)

    def victims(self, running: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """The longest first; of equals the last to come."""
        return sorted(range(len(running)), key=lambda i: (-self._length(running[i], now_s), -running[i].arrival_order))

    def _length(self, view: SequenceView, now_s: float) -> float:
        left = view.todo_tokens + view.max_tokens - view.output_tokens
        return left - self._ageing_tokens_per_s * max(0.0, now_s - view.arrival_s)
