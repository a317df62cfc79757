"""The thin client of the serving benchmark: it takes bytes as they come, so that where they are cut must not matter."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from benchmarks.thin_client import stream_all, usage_of
from tests.server.rig import Server

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = (
    b'data: {"choices": [{"text": "\\r\\n0\\r\\n\\r\\n 0"}]}\n\n',  # what ends a body, as JSON has it
    b": keep-alive\n\n",
    b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n",
    b"data: [DONE]\n\n",
)


def chunked(parts: tuple[bytes, ...]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


WHOLE = HEAD + chunked(EVENTS)


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
    """URL of a server that takes one connection and answers each request on it."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := connection.recv(65536):
                answer(connection, request)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join(10)
            assert not thread.is_alive(), "the client left its connection open"


def test_cut_anywhere() -> None:
    """One answer after another on a connection, each cut at another byte. Mutation: the end looked for in each piece by itself."""
    cuts = iter(range(1, len(WHOLE)))
    taken: list[bytes] = []

    def answer(connection: socket.socket, request: bytes) -> None:
        cut = next(cuts)
        taken.append(request)
        connection.sendall(WHOLE[:cut])
        threading.Event().wait(0.001)  # so that it comes in two pieces
        connection.sendall(WHOLE[cut:])

    bodies = [b'{"number": %d}' % i for i in range(len(WHOLE) - 1)]
    with answering(answer) as url:
        _, answers = stream_all(url, "/path", bodies, 1, timeout_s=5)
    assert answers == [WHOLE] * len(bodies) and [usage_of(one) for one in answers] == [USAGE] * len(bodies)
    assert [request.partition(b"\r\n\r\n")[2] for request in taken] == bodies
    assert taken[0].startswith(b"POST /path HTTP/1.1\r\nHost: 127.0.0.1:")


@pytest.mark.parametrize(
    ("sent", "word"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}", "429"),
        (WHOLE[:-7], "DONE"),
        (b"HTTP/1.1 200", "HTTP/1.1 200"),
    ],
)
def test_what_is_no_whole_stream(sent: bytes, word: str) -> None:
    """A refusal, and a connection that ends early: told with what came last, and no connection stays open."""

    def answer(connection: socket.socket, request: bytes) -> None:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)

    with answering(answer) as url, pytest.raises(RuntimeError, match=word):
        stream_all(url, "/path", [b"{}"], 1)


def test_silence() -> None:
    """A server that says nothing more is not waited for for ever."""
    with answering(lambda connection, request: connection.sendall(WHOLE[:50])) as url:
        with pytest.raises(RuntimeError, match="0 of 1 streams have ended"):
            stream_all(url, "/path", [b"{}"], 1, timeout_s=0.1)


@pytest.mark.parametrize("parts", [EVENTS[:2] + EVENTS[3:], EVENTS[:3], (b'data: {"error": {}}\n\n', EVENTS[3])])
def test_no_usage(parts: tuple[bytes, ...]) -> None:
    """A stream without it, without its end, or that failed."""
    with pytest.raises(RuntimeError):
        usage_of(HEAD + chunked(parts))


@pytest.mark.slow
def test_with_a_server(server: Server) -> None:
    """More bodies than clients: each is answered once and whole."""
    counts = [*range(1, 13)]
    options = {"prompt": "a", "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [
        json.dumps({**options, "max_tokens": count, "stream_options": {"include_usage": True}}).encode()
        for count in counts
    ]
    seconds, answers = stream_all(server.url, "/v1/completions", bodies, 4)
    assert seconds > 0 and sorted(usage_of(one)["completion_tokens"] for one in answers) == counts
