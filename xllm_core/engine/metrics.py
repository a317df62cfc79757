"""Step records: kept in a ring for reports, handed to observers in batches on a thread of their own."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence

from xllm_core.plugins.contracts.observer import Observer, StepRecord

log = logging.getLogger("xllm.engine")

RING_SIZE = 8192
_BATCH = 64


class StepLog:
    """Takes one record per step. Without observers that is one append; with them, one queue put per `_BATCH` steps."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self.records: deque[StepRecord] = deque(maxlen=RING_SIZE)
        self.num_lost = 0
        self._observers = tuple(observers)
        self._batch: list[StepRecord] = []
        self._queue: queue.Queue[list[StepRecord] | None] = queue.Queue(maxsize=256)
        self._thread: threading.Thread | None = None
        if self._observers:
            self._thread = threading.Thread(target=self._deliver, name="xllm-observers", daemon=True)
            self._thread.start()

    def add(self, record: StepRecord) -> None:
        """Keep a record. A full queue (a slow observer) drops the batch and counts it; the step never waits."""
        self.records.append(record)
        if self._thread is None:
            return
        self._batch.append(record)
        if len(self._batch) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Hand over what has gathered."""
        if self._thread is None or not self._batch:
            return
        try:
            self._queue.put_nowait(self._batch)
        except queue.Full:
            self.num_lost += len(self._batch)
        self._batch = []

    def close(self) -> None:
        """Deliver what is left and end the thread."""
        if self._thread is None:
            return
        self.flush()
        if self.num_lost:
            log.warning("observers were too slow for %d step records, which they did not see", self.num_lost)
        self._queue.put(None)
        self._thread.join(timeout=5.0)
        self._thread = None

    def _deliver(self) -> None:
        alive = list(self._observers)
        while (batch := self._queue.get()) is not None:
            for observer in list(alive):
                try:
                    observer.observe(batch)
                except Exception:  # an observer's fault must not end the others, nor the engine
                    log.exception("observer %s failed and is switched off", type(observer).__name__)
                    alive.remove(observer)
        for observer in alive:
            observer.close()


def early_share(records: Sequence[StepRecord]) -> float:
    """Of consecutive steps, which share was planned before the forward of the one before had ended: what overlap is about. 0 for none.

    Of a device that computes while the host goes on, only the launch ends there: the share says little of it.
    """
    pairs = [(a, b) for a, b in itertools.pairwise(records) if b.step == a.step + 1]
    return sum(b.started_s < a.forward_ended_s for a, b in pairs) / max(1, len(pairs))


class LogObserver:
    """Writes one line per `interval_s` of engine time to the log `xllm.engine`."""

    def __init__(self, interval_s: float = 10.0) -> None:
        self._interval_s = interval_s
        self._window: list[StepRecord] = []

    def observe(self, records: Sequence[StepRecord]) -> None:
        """Gather; report when the interval is full."""
        self._window.extend(records)
        span_s = self._window[-1].started_s - self._window[0].started_s
        if span_s >= self._interval_s:
            last, tokens = self._window[-1], sum(r.num_tokens for r in self._window)
            log.info(
                "%.0f tokens/s computed, %d running, %d waiting, %d of %d KV blocks used",
                tokens / span_s, last.num_running, last.num_waiting, last.used_blocks, last.total_blocks,
            )  # fmt: skip
            self._window = []

    def close(self) -> None:
        """Nothing is held."""
