"""A real mooncake_master on loopback, and what can happen to it; `-p real_master` gives it to the conformance kit."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from xllm_mooncake.client import answers
from xllm_mooncake.master import master_command, master_environment

SMALL = {"allow_wildcard_listeners": True, "segment_bytes": 32 << 20, "staging_bytes": 1 << 20}
"""Settings of a store for tests, but for its master."""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Master:
    """A mooncake_master, and what can happen to it. Also a `StorePeer` of the conformance kit."""

    def __init__(self) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.settings: Mapping[str, Any] = {**SMALL, "master": self.address}
        self.process: subprocess.Popen[bytes] | None = None
        self.restart()

    def restart(self) -> None:
        """Start it, at the same address each time."""
        command = master_command(self.port, self.metrics_port)
        # client_ttl: seconds until a dead provider is forgotten.
        command += ["--client_ttl=2", "--default_kv_lease_ttl=10000"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=master_environment(), stdout=quiet, stderr=quiet)
        wait_for(lambda: answers(self.address), "the master")

    def kill(self) -> None:
        """As kill -9 does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        """It keeps its port, and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """The first true value; fails the test after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"no {what} within {timeout_s:g} s"
        time.sleep(0.01)
    return value


@pytest.fixture
def xllm_store_peer() -> Iterator[Master]:
    """For the conformance kit."""
    one = Master()
    yield one
    one.kill()
