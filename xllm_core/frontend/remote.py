"""An engine in a process of its own, seen from an event loop: starts it, speaks with it, notices at once when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from xllm_core import errors
from xllm_core.engine import messages
from xllm_core.engine.info import EngineInfo
from xllm_core.engine.messages import Frames, FromEngine, ToEngine, encode, from_engine
from xllm_core.errors import EngineDeadError, RequestError, XllmError
from xllm_core.types import EngineRequest, TokenOutput

_SOCKET_BYTES = 1 << 22
_END_S = 5.0  # how long a process that was told to stop may take


class EngineStartError(XllmError):
    """An engine process could not start; the message is its own."""


class EngineProcess(asyncio.Protocol):
    """One engine process. An `EngineClient` whose `poll` never waits: `on_output` says when there is something to take.

    Create, await `start`, use from that event loop only, `close`. stats: as of the last message. admitted: (request id, monotonic seconds)
    and refused: (request id, error) gather until they are taken. Every death, asked for or not, calls `on_death` once.
    """

    def __init__(
        self,
        tables: Mapping[str, Any],
        *,
        on_output: Callable[[], None],
        on_death: Callable[[EngineDeadError], None],
        on_start: Callable[[messages.Phase | messages.Loading], None] = lambda event: None,
    ) -> None:
        self.stats = messages.EngineStats()
        self.admitted: list[tuple[str, float]] = []
        self.preempted: list[str] = []
        self.refused: list[tuple[str, RequestError]] = []
        self.last_heard_s = time.monotonic()
        self._tables = dict(tables)
        self._on_output, self._on_death, self._on_start = on_output, on_death, on_start
        self._outputs: list[TokenOutput] = []
        self._unfinished: dict[str, set[int]] = {}  # request id -> indices of sequences without an end
        self._frames = Frames()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._death_fd = -1
        self._ready: asyncio.Future[messages.Ready] | None = None
        self._planned: messages.Planned | None = None
        self._is_planned = asyncio.Event()
        self._text: messages.TextFiles | None = None
        self._has_text = asyncio.Event()
        self._info: EngineInfo | None = None
        self._failure: messages.Failed | None = None
        self._death: EngineDeadError | None = None
        self._is_closing = False

    # ---- life ------------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Process id; None before `spawn`."""
        return self._process.pid if self._process is not None else None

    @property
    def is_alive(self) -> bool:
        """Whether it runs, as far as is known."""
        return self._process is not None and self._death is None

    def spawn(self) -> socket.socket:
        """Start the process; returns our end of the socket pair. From the main thread: on Linux the child dies with the thread that made it."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        death_read, self._death_fd = os.pipe()
        command = [
            sys.executable,
            "-m",
            "xllm_core.engine.process",
            *map(str, (theirs.fileno(), death_read, os.getpid())),
        ]
        try:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(), death_read), stdin=subprocess.DEVNULL, stdout=2
            )
        finally:
            theirs.close()
            os.close(death_read)
        return ours

    async def start(self, sock: socket.socket, planned: messages.Planned | None = None) -> messages.Ready:
        """Wait until the engine of `spawn` serves. planned: what it is to build. Raises EngineStartError with the engine's own message."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        sock.setblocking(False)
        await loop.create_connection(lambda: self, sock=sock)
        self._send(messages.Start(self._tables, planned))
        return await self._ready

    async def planned(self) -> messages.Planned | None:
        """What this engine decided, for others to build, while its own start goes on; None if it ended before."""
        await self._is_planned.wait()
        return self._planned

    async def text(self) -> messages.TextFiles | None:
        """What the text side needs, while the start goes on; None if the engine ended before."""
        await self._has_text.wait()
        return self._text

    def close(self) -> None:
        """Ask the process to end, and make it if it does not. Safe to call twice; blocks for some seconds at most."""
        self._is_closing = True
        if self._process is None:
            return
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(messages.Stop()))
            self._transport.close()
        with contextlib.suppress(OSError):
            os.close(self._death_fd)  # whatever it is doing, its watcher sees this
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # ---- EngineClient ----------------------------------------------------------------------------------------------------

    def info(self) -> EngineInfo:
        """What is being served."""
        if self._info is None:
            raise EngineDeadError("the engine is not ready; wait for its start")
        return self._info

    def check(self, request: EngineRequest) -> None:
        """Raise the RequestError of a request that could never be served here."""
        self.info().admission.check(request)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. What the engine itself refuses later (its queue is full) arrives in `refused`."""
        self._require_alive()
        self.check(request)
        self._unfinished[request.request_id] = set(range(request.params.n))
        self._send(messages.Submit(request))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request or one of its sequences."""
        if request_id not in self._unfinished or self._death is not None:
            return
        self._end(request_id, index)
        self._send(messages.Abort(request_id, index))

    def poll(self) -> list[TokenOutput]:
        """What came since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether anything submitted is unfinished."""
        return bool(self._unfinished)

    @property
    def num_unfinished(self) -> int:
        """Sequences without an end."""
        return sum(map(len, self._unfinished.values()))

    def holds(self, request_id: str) -> bool:
        """Whether this request is here and unfinished."""
        return request_id in self._unfinished

    def ping(self) -> None:
        """Ask for a sign of life; `last_heard_s` moves when it comes."""
        if self.is_alive and self._info is not None:
            self._send(messages.Ping())

    # ---- asyncio.Protocol ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours now."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Messages came."""
        self.last_heard_s = time.monotonic()
        before = self.stats
        for body in self._frames.feed(data):
            self._take(from_engine.decode(body))
        if self._outputs or self.admitted or self.preempted or self.refused or self.stats is not before:
            self._on_output()

    def connection_lost(self, error: Exception | None) -> None:
        """The process has closed its end: it is over, or about to be."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(
                0.2
            )  # a process that closed its last socket is gone in a moment; its status belongs in the message
        self._death = EngineDeadError(self._obituary())
        self._unfinished.clear()
        self._is_planned.set()
        self._has_text.set()
        if self._ready is not None and not self._ready.done():
            failure = self._failure
            own = failure is not None and failure.is_ours
            start_error = EngineStartError(failure.message if failure is not None and own else str(self._death))
            self._ready.set_exception(start_error)
        if not self._is_closing:
            self._on_death(self._death)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, messages.Stepped):
            self.stats = message.stats
            self.admitted += message.admitted
            self.preempted += message.preempted
            self._outputs += message.outputs
            for output in message.outputs:
                if output.finish_reason is not None:
                    self._end(output.request_id, output.index)
        elif isinstance(message, messages.Pong):
            self.stats = message.stats
        elif isinstance(message, messages.Refused):
            self._end(message.request_id, None)
            self.refused.append((message.request_id, _request_error(message)))
        elif isinstance(message, messages.Ready):
            self._info = message.info
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, messages.Failed):
            self._failure = message
        elif isinstance(message, messages.Planned):
            self._planned = message
            self._is_planned.set()
        elif isinstance(message, messages.TextFiles):
            self._text = message
            self._has_text.set()
        else:
            self._on_start(message)

    def _end(self, request_id: str, index: int | None) -> None:
        """A sequence has ended, or all of a request. A stop string and the engine may both have ended it: it counts once."""
        left = self._unfinished.get(request_id, set())
        left.discard(index if index is not None else -1)
        if index is None or not left:
            self._unfinished.pop(request_id, None)

    def _send(self, message: ToEngine) -> None:
        assert self._transport is not None
        self._transport.write(encode(message))

    def _require_alive(self) -> None:
        if self._death is not None:
            raise self._death
        if self._is_closing:
            raise EngineDeadError("the engine was closed; start a new one")

    def _obituary(self) -> str:
        assert self._process is not None
        status = self._process.poll()
        if self._failure is not None:
            return f"the engine process failed: {self._failure.kind}: {self._failure.message}"
        if status is not None and status < 0:
            return f"the engine process (pid {self._process.pid}) was killed by {signal.Signals(-status).name}"
        return f"the engine process (pid {self._process.pid}) ended with status {status}"


def _request_error(message: messages.Refused) -> RequestError:
    """The engine's error, of the same class where a message is all that the class needs."""
    kind = getattr(errors, message.kind, None)
    if kind is errors.QueueFullError:
        return errors.QueueFullError(message.message)
    return errors.InvalidRequestError(message.message, param=message.param)
