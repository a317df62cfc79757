"""The peer of the dummy store `far`, as its author would give it to the kit: `-p tests.testing.far_peer`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


class FarPeer:
    """An `xllm_core.testing.store_bench.StorePeer`."""

    def __init__(self, path: str) -> None:
        self.settings = {"socket": path}
        self._path = path
        self.restart()

    def restart(self) -> None:
        """Start it and wait until it listens."""
        command = [sys.executable, "-m", "xllm_far.peer", self._path]
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        """As a crash would."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def pause(self) -> None:
        """It answers nobody."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def xllm_store_peer() -> Iterator[FarPeer]:
    """A peer of its own for each test."""
    with tempfile.TemporaryDirectory() as folder:
        peer = FarPeer(str(Path(folder) / "far.sock"))
        yield peer
        peer.kill()
