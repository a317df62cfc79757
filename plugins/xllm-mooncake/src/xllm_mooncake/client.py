"""The engine's end of the client's process: start it, call it with a time limit, end it. Owned by one thread."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("xllm_mooncake")
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from xllm_mooncake.client_process import main; main()"
)
_STUCK_S = 20.0
_CLOSE_WAIT_S = 0.3


class ClientError(Exception):
    """A call has no answer: the process ended, was not there, or took too long."""


class LateError(ClientError):
    """It took too long, and goes on: the memory that it was given is still in use."""


class Client:
    """One process at most. A call that took too long is still under way in it, and nothing else can be asked until it has ended."""

    def __init__(self, host: str, memory_fd: int, memory_bytes: int) -> None:
        self._host = host
        self._memory = (memory_fd, memory_bytes)
        self._process: subprocess.Popen[str] | None = None
        self._line: socket.socket | None = None
        self._buffer = b""
        self._number = 0
        self._late: tuple[float, Callable[[], None]] | None = None
        self._last_words: deque[str] = deque(maxlen=5)

    @property
    def is_running(self) -> bool:
        """Is there a process?"""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid if self._process is not None else None

    @property
    def last_words(self) -> str:
        """What it wrote to stderr at the end, to be put behind a message."""
        return f"; its last words: {' | '.join(self._last_words)}" if self._last_words else ""

    def start(self) -> None:
        """A new process; one that was there is killed."""
        self.kill()
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._memory[0])
        arguments = [json.dumps(sys.path), str(fds[0]), str(fds[1]), str(self._memory[1])]
        # Without the address it would tell other engines one of its choosing; one try, as the port was probed before.
        environment = {**os.environ, "MC_TCP_BIND_ADDRESS": self._host, "MC_STORE_CLIENT_SETUP_RETRIES": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *arguments], pass_fds=fds, env=environment, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        theirs.close()
        self._line, self._buffer = ours, b""
        threading.Thread(target=self._hear, args=(self._process,), name="xllm-mooncake-log", daemon=True).start()

    def call(
        self, name: str, *, timeout_s: float, on_late: Callable[[], None] = lambda: None, **arguments: Any
    ) -> list[int]:
        """Codes, as `client_process.Client` gives them. Raises ClientError; after a LateError `on_late` is called when the call has ended."""
        if not self.is_free() or self._line is None:
            raise ClientError(f"the client still works on an earlier call{self.last_words}")
        self._number += 1
        request = {"number": self._number, "do": name, **arguments}
        try:
            self._line.sendall(json.dumps(request).encode() + b"\n")
            answer = self._answer(time.monotonic() + timeout_s)
        except TimeoutError:
            self._late = (time.monotonic(), on_late)
            raise LateError(f"{name} has not ended after {timeout_s:g} s") from None
        except OSError as error:
            self.kill()
            raise ClientError(f"the client's process has ended ({error}){self.last_words}") from error
        if "error" in answer:
            raise ClientError(f"{name}: {answer['error']}")
        codes: list[int] = answer["codes"]
        return codes

    def is_free(self) -> bool:
        """Can a call be made? Takes late answers; a process that has been busy for too long is killed."""
        if self._late is None:
            return self._line is not None
        since_s, on_late = self._late
        try:
            self._answer(time.monotonic())
            self._late = None
            on_late()
        except TimeoutError:
            if time.monotonic() - since_s > _STUCK_S:
                _log.warning("the client's process has not answered for %g s and is started anew", _STUCK_S)
                self.kill()
        except OSError:
            self.kill()
        return self._late is None and self._line is not None

    def interrupt(self) -> None:
        """End the process from another thread: the call under way fails there."""
        process = self._process
        if process is not None:
            process.kill()

    def kill(self) -> None:
        """End the process now."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._late is not None:
            late, self._late = self._late, None
            late[1]()

    def close(self, *, is_graceful: bool) -> None:
        """End it; gracefully it may take its memory out of the store first, and goes on with that by itself, for seconds."""
        if not is_graceful or self._line is None or not self.is_free() or self._process is None:
            self.kill()
            return
        process, self._process = self._process, None
        try:
            self._line.sendall(json.dumps({"number": 0, "do": "close"}).encode() + b"\n")
        except OSError:
            process.kill()
        try:
            process.wait(_CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            threading.Thread(target=process.wait, name="xllm-mooncake-end", daemon=True).start()
        self._line.close()
        self._line = None

    def _answer(self, deadline_s: float) -> dict[str, Any]:
        """The next line. Raises TimeoutError at the deadline, and OSError when there will be none."""
        assert self._line is not None
        while b"\n" not in self._buffer:
            wait_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([self._line], [], [], wait_s)[0]:
                raise TimeoutError
            piece = self._line.recv(1 << 16)
            if not piece:
                raise ConnectionError("it closed its socket")
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _hear(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for text in lines:
                self._last_words.append(text.strip())
                _log.debug("client: %s", text.rstrip())


def answers(address: str, timeout_s: float = 0.25) -> bool:
    """Does anything accept connections there? Asked before Mooncake is, which would block for seconds where nothing does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, UnicodeError):  # the latter for a name that no host can have
        return False
    return True
