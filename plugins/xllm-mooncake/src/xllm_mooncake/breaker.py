"""A circuit breaker: after a failure nobody calls, until a probe has found the other side alive again."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_WAIT_S = 0.25
MAX_WAIT_S = 2.0


class Breaker:
    """Closed: calls are made. Open: none is; probes are due at growing intervals, and one that succeeds closes it.

    Owned by one thread; others may read `is_closed`. clock: seconds that only grow.
    """

    def __init__(self, *, is_closed: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wait_s = FIRST_WAIT_S
        self._due_s = clock()
        self.is_closed = is_closed
        self.reason = "" if is_closed else "not connected yet"
        self.num_openings = 0

    def open(self, reason: str) -> None:
        """A call failed, or a probe did: wait before the next, twice as long as before it."""
        if self.is_closed:
            self.num_openings += 1
            self._wait_s = FIRST_WAIT_S
        else:
            self._wait_s = min(2 * self._wait_s, MAX_WAIT_S)
        self.is_closed, self.reason = False, reason
        self._due_s = self._clock() + self._wait_s

    def close(self) -> None:
        """A probe succeeded."""
        self.is_closed, self.reason = True, ""

    @property
    def wait_s(self) -> float:
        """Seconds until a probe is due; 0 now."""
        return max(0.0, self._due_s - self._clock())
