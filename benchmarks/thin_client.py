"""Closed-loop clients that cost next to nothing, for a server that shares its cores with them: plain sockets and one `select`.

They take the bytes of a stream as they come, and look at what they say when the round is over. `xllm bench serve` is the load generator
for everything else: it reads and times every event, which costs as much as the server takes to make one.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPResponse
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

_END = b"\r\n0\r\n\r\n"  # of a body in chunks, and of nothing within one: JSON has no bare line ends
_READ_BYTES = 1 << 16


@dataclass(slots=True)
class _Connection:
    sock: socket.socket
    answer: bytearray = field(default_factory=bytearray)


class _Bytes:
    """Bytes in the place of a socket, as `HTTPResponse` reads them."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> BytesIO:
        """A file of all of them."""
        return BytesIO(self._data)


def stream_all(
    url: str, path: str, bodies: Sequence[bytes], num_clients: int, timeout_s: float = 120.0
) -> tuple[float, list[bytes]]:
    """(seconds, raw answers in the order of their ends): each client sends its next body when its last stream has ended.

    Raises RuntimeError where a connection ends early, an answer is no stream or nothing comes for `timeout_s`.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    waiting = [_request(parts.netloc, path, body) for body in reversed(bodies)]
    answers: list[bytes] = []
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        connections = [
            _Connection(stack.enter_context(socket.create_connection((parts.hostname, parts.port))))
            for _ in range(min(num_clients, len(bodies)))
        ]
        start_s = time.perf_counter()
        for connection in connections:
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(connection.sock, selectors.EVENT_READ, connection)
            connection.sock.sendall(waiting.pop())
        while len(answers) < len(bodies):
            if not (ready := selector.select(timeout_s)):
                raise RuntimeError(
                    f"nothing came for {timeout_s:g} s; {len(answers)} of {len(bodies)} streams have ended"
                )
            for key, _ in ready:
                if (answer := _take(key.data)) is None:
                    continue
                answers.append(answer)
                if waiting:
                    key.data.sock.sendall(waiting.pop())
        duration_s = time.perf_counter() - start_s
    return duration_s, answers


def _request(host: str, path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _take(connection: _Connection) -> bytes | None:
    """What has come; the whole answer where it has ended."""
    data = connection.sock.recv(_READ_BYTES)
    answer = connection.answer
    answer += data
    is_refusal = not answer.startswith(b"HTTP/1.1 200") and len(answer) > 12
    if not data or is_refusal:
        raise RuntimeError(f"not a whole stream: {bytes(answer[-500:])!r}")
    if not data.endswith(b"\n") or not answer.endswith(_END):
        return None
    connection.answer = bytearray()
    return bytes(answer)


def usage_of(answer: bytes) -> dict[str, Any]:
    """The usage that a whole stream ends with. Raises RuntimeError where it does not."""
    response = HTTPResponse(_Bytes(answer))  # type: ignore[arg-type]
    response.begin()
    events = [line[6:] for line in response.read().splitlines() if line.startswith(b"data: ")]
    if len(events) < 2 or events[-1] != b"[DONE]":
        raise RuntimeError(f"the stream does not end with [DONE]: {answer[-500:]!r}")
    usage = json.loads(events[-2]).get("usage")
    if usage is None:
        raise RuntimeError(f"the stream has no usage: {events[-2]!r}")
    return dict(usage)
