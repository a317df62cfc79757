"""A scheduling policy."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_core.plugins import SequenceView


class Lifo:
    """Last come, first served."""

    is_static = True
    uses_priority = False

    def order(self, waiting: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """Newest first."""
        return sorted(range(len(waiting)), key=lambda i: -waiting[i].arrival_order)

    def chunk(self, view: SequenceView, budget_tokens: int) -> int:
        """As much as fits."""
        return min(view.todo_tokens, budget_tokens)

    def victims(self, running: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        """Oldest first."""
        return sorted(range(len(running)), key=lambda i: running[i].arrival_order)
