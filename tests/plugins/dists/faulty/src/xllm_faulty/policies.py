"""Policies with a fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xllm_core.engine.policy import Fcfs
from xllm_core.plugins import SequenceView


class Starves(Fcfs):
    """Last come, first served."""

    def order(self, waiting: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        return sorted(range(len(waiting)), key=lambda i: -waiting[i].arrival_order)


class Drops(Fcfs):
    """Forgets whoever came last of three or more."""

    def order(self, waiting: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        found = list(super().order(waiting, now_s))
        return found[:-1] if len(found) > 2 else found


class Remembers(Fcfs):
    """Answers the other way round every second time."""

    def __init__(self) -> None:
        self._asked = 0

    def victims(self, running: Sequence[SequenceView], now_s: float) -> Sequence[int]:
        self._asked += 1
        found = list(super().victims(running, now_s))
        return found[::-1] if self._asked % 2 else found


class Greedy(Fcfs):
    """Takes all that is left, whatever the budget."""

    def chunk(self, view: SequenceView, budget_tokens: int) -> int:
        return view.todo_tokens


class NotStatic(Fcfs):
    """Says that its order is static, and orders by what is left."""

    def order(self, waiting: Sequence[Any], now_s: float) -> Sequence[int]:
        return sorted(range(len(waiting)), key=lambda i: (waiting[i].todo_tokens - 2 * waiting[i].output_tokens, i))
