"""Ctrl-C between steps, never inside one: a step that is cut in two would leave scheduler and worker at odds."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Deferral:
    """A handler of SIGINT that remembers the first signal and gives way to the second."""

    def __init__(self) -> None:
        self.is_pending = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.is_pending:
            self.is_pending = False
            raise KeyboardInterrupt  # whoever asks twice does not want to wait for the step
        self.is_pending = True


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold SIGINT back until the block has ended, then give it to the handler that was there, which by default raises KeyboardInterrupt.

    A second signal while one is held back raises at once. Off the main thread, inside another such block, and where SIGINT is not
    handled by Python, it does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    is_ours = isinstance(getattr(previous, "__self__", None), _Deferral)
    if not callable(previous) or is_ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    deferral = _Deferral()
    signal.signal(signal.SIGINT, deferral.handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if deferral.is_pending:
            previous(signal.SIGINT, None)
