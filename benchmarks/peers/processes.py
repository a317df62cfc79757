"""Processes of engines: each leads a session, sleeps by SIGSTOP while another computes, and does not outlive this program."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.machine_use import family, read_processes

_STOP_S = 30.0


class Guard:
    """A child that waits for this program's end and then ends every session it was told of, even after a kill -9."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.peers.processes"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)

    def tell(self, verb: str, pid: int) -> None:
        """ "add" or "drop" a session."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{verb} {pid}\n")
        self._child.stdin.flush()

    def close(self) -> None:
        """It ends what is left, and itself."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


class Running:
    """One process with its descendants. has_pipes: it is spoken to by lines of standard input and output."""

    def __init__(
        self, command: Sequence[str], log: Path, guard: Guard, *, env: Mapping[str, str | None], has_pipes: bool
    ) -> None:
        self.log = log
        self._guard = guard
        # Threads that wait as their engine likes: what `make` sets for the tests is not for them.
        mine = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "KMP_"))}
        full = {key: value for key, value in {**mine, **env}.items() if value is not None}
        pipe = subprocess.PIPE if has_pipes else subprocess.DEVNULL
        self.started_s = time.perf_counter()
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe if has_pipes else out, stderr=out, env=full, start_new_session=True, text=True
            )  # fmt: skip
        guard.tell("add", self.process.pid)

    @property
    def pid(self) -> int:
        """Of the process that leads the session."""
        return self.process.pid

    def pause(self) -> None:
        """Nothing of it runs any more."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on where it was."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ask, wait, then end it: the whole family."""
        self.resume()
        members = family(self.pid, read_processes())
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        for pid in set(members) & set(read_processes()) - {self.pid}:
            _kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._guard.tell("drop", self.pid)

    def tail(self, num_lines: int = 4) -> str:
        """The end of its log, for a message."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-num_lines:])[-600:]

    def _signal(self, number: signal.Signals) -> None:
        for pid in family(self.pid, read_processes()):
            _kill(pid, number)


def free_port() -> int:
    """One that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _guard() -> None:
    """The guard's own program: until its standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions: set[int] = set()
    for line in sys.stdin:
        verb, _, pid = line.partition(" ")
        (sessions.add if verb == "add" else sessions.discard)(int(pid))
    processes = read_processes()
    for root in sessions:
        for pid in family(root, processes):
            _kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _guard()
