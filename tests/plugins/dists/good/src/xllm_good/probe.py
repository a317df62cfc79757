"""The probe of the toy device. It runs in a child process, so a test tells it what to do through the environment."""

from __future__ import annotations

import os
import signal
import time


def probe() -> str | None:
    """Usable, or what TOY_PROBE says: a reason, "crash" or "hang"."""
    answer = os.environ.get("TOY_PROBE")
    print("chatter on stdout that is not the answer")
    if answer == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if answer == "hang":
        time.sleep(600)
    return answer
