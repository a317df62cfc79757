"""Device probes: one child process each, all at once, so that a driver that hangs, crashes or takes its time harms nobody."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterable
from types import TracebackType

TIMEOUT_S = 60.0

# Nothing of ours is imported: a bare interpreter starts in a fraction of the time, and there may be many.
_CHILD = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
module, _, attributes = sys.argv[2].partition(":")
probe = importlib.import_module(module)
for name in attributes.split("."):
    probe = getattr(probe, name)
print("\\n" + json.dumps(probe()))
"""


class Probes:
    """Probes that run. A context: on leaving it, those still running are killed."""

    def __init__(self, targets: Iterable[str] = (), *, timeout_s: float | None = None) -> None:
        """targets: "module:attribute", started now. timeout_s: for each, from its start."""
        self._timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
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
    """One probe. A thread of its own reads what it says, as it comes, and sees its end at once."""

    def __init__(self, target: str, timeout_s: float) -> None:
        command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), target]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
        self._reason = ""
        self._thread = threading.Thread(target=self._read, args=(timeout_s,), daemon=True)
        self._thread.start()

    def answer(self) -> str:
        self._thread.join()
        return self._reason

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._thread.join()

    def _read(self, timeout_s: float) -> None:
        try:
            stdout, stderr = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            self._reason = f"its probe did not answer within {timeout_s:g} s"
            return
        status = self._process.returncode
        if status != 0:
            ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self._reason = f"its probe {ended}: {(stderr.strip().splitlines() or ['no message'])[-1]}"
            return
        answer = json.loads(stdout.strip().splitlines()[-1])
        self._reason = "" if answer is None else str(answer)
