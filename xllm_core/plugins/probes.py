"""Device probes: one child process each, all at once, so that a driver that hangs, crashes or takes its time harms nobody."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import IO

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


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    started_s: float
    stdout: IO[bytes]
    stderr: IO[bytes]


class Probes:
    """Probes that run. A context: on leaving it, those still running are killed."""

    def __init__(self, targets: Iterable[str] = (), *, timeout_s: float | None = None) -> None:
        """targets: "module:attribute", started now. timeout_s: for each, from its start."""
        self._timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        self._children = {target: _start(target) for target in targets}
        self._answers: dict[str, str] = {}

    def answer(self, target: str) -> str:
        """Why the device is not usable, or "". Waits; starts the probe if it was not. A crash or a hang is a reason too."""
        if target not in self._answers:
            if target not in self._children:
                self._children[target] = _start(target)
            self._answers[target] = self._wait(self._children[target])
        return self._answers[target]

    def _wait(self, child: _Child) -> str:
        try:
            status = child.process.wait(max(0.0, child.started_s + self._timeout_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"its probe did not answer within {self._timeout_s:g} s"
        stdout, stderr = _text(child.stdout), _text(child.stderr)
        if status != 0:
            ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            return f"its probe {ended}: {(stderr.splitlines() or ['no message'])[-1]}"
        answer = json.loads(stdout.splitlines()[-1])
        return "" if answer is None else str(answer)

    def __enter__(self) -> Probes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children.values():
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()
            child.stdout.close()
            child.stderr.close()


def _start(target: str) -> _Child:
    stdout, stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # a pipe that nobody reads would fill up
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), target]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    return _Child(process, time.monotonic(), stdout, stderr)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()
