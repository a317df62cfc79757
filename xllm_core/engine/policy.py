"""Built-in scheduling policies: who is admitted first, how much of it runs, who gives way. Pure functions over snapshots."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_core.plugins.contracts.scheduler import SequenceView


class Fcfs:
    """First come, first served. The last to arrive gives way: it has the least to lose and the longest still to go."""

    is_static = True
    uses_priority = False

    def order(self, waiting: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """By arrival; a preempted sequence keeps its place."""
        return sorted(range(len(waiting)), key=lambda i: waiting[i].arrival_order)

    def chunk(self, view: SequenceView, budget_tokens: int) -> int:
        """As much as the budget leaves."""
        return min(view.todo_tokens, budget_tokens)

    def victims(self, running: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """Newest first."""
        return sorted(range(len(running)), key=lambda i: -running[i].arrival_order)


class Priority:
    """Lower `priority` first, then by arrival. The least important, then the newest, gives way."""

    is_static = True
    uses_priority = True

    def order(self, waiting: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """By (priority, arrival)."""
        return sorted(range(len(waiting)), key=lambda i: (waiting[i].priority, waiting[i].arrival_order))

    def chunk(self, view: SequenceView, budget_tokens: int) -> int:
        """As much as the budget leaves."""
        return min(view.todo_tokens, budget_tokens)

    def victims(self, running: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """By (priority, arrival), backwards."""
        return sorted(range(len(running)), key=lambda i: (-running[i].priority, -running[i].arrival_order))
