"""A thread that does what it is given, the most urgent first."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

_log = logging.getLogger("xllm_mooncake")

Job = Callable[[], None]


class Lane:
    """Jobs of several urgencies, each kind in order. What a job raises is logged and harms no other.

    idle: called between jobs; returns after how many seconds it wants to be called again, or None.
    """

    def __init__(self, name: str, num_urgencies: int, idle: Callable[[], float | None] = lambda: None) -> None:
        self._jobs: list[deque[Job]] = [deque() for _ in range(num_urgencies)]
        self._idle = idle
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, urgency: int, job: Job) -> bool:
        """Do it when its turn comes; 0 is the most urgent. False, and nothing is done, after `close`."""
        with self._changed:
            if self._is_closed:
                return False
            self._jobs[urgency].append(job)
            self._changed.notify()
        return True

    def close(self, timeout_s: float) -> bool:
        """Forget what has not begun, and wait for what has; False if it goes on beyond the timeout."""
        with self._changed:
            self._is_closed = True
            for jobs in self._jobs:
                jobs.clear()
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            wait_s = self._guarded(self._idle)
            with self._changed:
                job = self._next()
                if job is None and not self._is_closed:
                    self._changed.wait(wait_s)
                    job = self._next()
                if self._is_closed:
                    return
            if job is not None:
                self._guarded(job)

    def _next(self) -> Job | None:
        return next((jobs.popleft() for jobs in self._jobs if jobs), None)

    def _guarded(self, call: Callable[[], float | None]) -> float | None:
        try:
            return call()
        except Exception:  # noqa: BLE001  it is logged, and the others go on
            _log.exception("a job of the Mooncake store failed")
            return 1.0
