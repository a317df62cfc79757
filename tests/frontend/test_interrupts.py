"""SIGINT held back: delivered after the block, at once the second time, and given to whoever handled it before."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from xllm_core.frontend.interrupts import deferred_interrupts


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_block_ends_first() -> None:
    """Red if the signal is raised inside, or swallowed."""
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        with deferred_interrupts():
            interrupt()
            done.append(1)
        done.append(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_signal_does_not_wait() -> None:
    """Whoever presses twice wants out. Red if both are held back."""
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        interrupt()
        done.append(1)
        interrupt()
        done.append(2)
    assert done == [1]


def test_blocks_nest_and_the_outermost_decides() -> None:
    """Red if the inner block delivers."""
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        with deferred_interrupts():
            interrupt()
        done.append(1)
    assert done == [1]


def test_another_handler_gets_its_signal() -> None:
    """An event loop or a program has its own idea of Ctrl-C. Red if KeyboardInterrupt is raised instead."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: seen.append(signum))
    try:
        with deferred_interrupts():
            interrupt()
            assert not seen
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    """Only the main thread may set handlers. Red if it is tried elsewhere: that is a ValueError."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with deferred_interrupts():
                pass
        except BaseException as error:  # noqa: BLE001  the assertion below shows it
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
