"""Device probes: one child process each, all at once, so that a driver that hangs, crashes or takes its time harms nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import IO

TIMEOUT_S = 60.0
_MAX_SAID_BYTES = 1 << 16

# Nothing of ours is imported: a bare interpreter starts in a fraction of the time, and there may be many. The answer goes out alone:
# whatever the probe prints, also at its exit, goes to stderr.
_CHILD = """
import importlib, json, os, sys
out = os.dup(1)
os.dup2(2, 1)
sys.path[:] = json.loads(sys.argv[1])
module, _, attributes = sys.argv[2].partition(":")
probe = importlib.import_module(module)
for name in attributes.split("."):
    probe = getattr(probe, name)
answer = probe()
os.write(out, json.dumps(answer if answer is None else str(answer)[:4000]).encode())
"""


class Probes:
    """Probes that run. A context: on leaving it, those still running are killed."""

    def __init__(self, targets: Iterable[str] = (), *, timeout_s: float | None = None) -> None:
        """targets: "module:attribute", started now. timeout_s: for each, from its start."""
        self._timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        self.told: set[str] = set()  # devices whose reason was logged: assemblies that share probes say it once
        self._children: dict[str, _Child] = {}
        for target in targets:
            self._children[target] = _Child(target, self._timeout_s)

    def answer(self, target: str) -> str:
        """Why the device is not usable, or "". Waits; starts the probe if it was not. A crash or a hang is a reason too."""
        if target not in self._children:
            self._children[target] = _Child(target, self._timeout_s)
        return self._children[target].answer()

    def __enter__(self) -> Probes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children.values():
            child.end()


class _Child:
    """One probe, in a session of its own, so that what it has started ends with it. A thread sees its end at once.

    It speaks into files: a pipe would stay open as long as anything that the probe has started lives.
    """

    def __init__(self, target: str, timeout_s: float) -> None:
        command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), target]
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, start_new_session=True
        )
        self._reason: str | None = None
        self._thread = threading.Thread(target=self._process.wait, daemon=True)
        self._thread.start()

    def answer(self) -> str:
        if self._reason is None:
            self._thread.join(max(0.0, self._deadline_s - time.monotonic()))
            is_late = self._thread.is_alive()
            self._stop()
            self._reason = f"its probe did not answer within {self._timeout_s:g} s" if is_late else self._said()
        return self._reason

    def end(self) -> None:
        self._stop()
        if self._reason is None:
            self._reason = "its probe was ended before it was asked"
        self._out.close()
        self._err.close()

    def _stop(self) -> None:
        if self._thread.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._thread.join()

    def _said(self) -> str:
        status = self._process.returncode
        if status != 0:
            ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            return f"its probe {ended}: {(_tail(self._err).strip().splitlines() or ['no message'])[-1]}"
        text = _tail(self._out)
        if not text:
            return "its probe ended the process and gave no answer"
        answer = json.loads(text)
        return "" if answer is None else str(answer).encode(errors="backslashreplace").decode()


def _tail(file: IO[bytes]) -> str:
    """The end of what a file holds, as text."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _MAX_SAID_BYTES))
    return file.read().decode(errors="replace")
