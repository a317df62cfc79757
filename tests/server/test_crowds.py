"""Many bad clients at once: those that drip, those that never read, those that leave at any moment. Good ones get what they always get."""

from __future__ import annotations

import json
import os
import random
import resource
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from tests.server.rig import Server

pytestmark = pytest.mark.slow

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NUM_DRIPPING, NUM_DEAF, NUM_CUTS = 500, 100, 1000
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc")


@pytest.fixture(scope="module", autouse=True)
def many_files() -> None:
    """A thousand sockets on this side."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def head(path: str, num_bytes: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {num_bytes}\r\n\r\n".encode()


def whole(path: str, body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    return head(path, len(raw)) + raw


def num_files(server: Server) -> int:
    """Descriptors of the API process."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def wait_for(is_so: Callable[[], bool], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_as_before(server: Server, num_files_before: int) -> None:
    """Nothing runs, waits, is held, or open."""
    load = server.wait_idle()
    assert load["num_requests_waiting"] == 0
    assert {name: server.metric(f"vllm:{name}") for name in GAUGES} == dict.fromkeys(GAUGES, 0)
    wait_for(lambda: num_files(server) <= num_files_before)


def good_request(server: Server, i: int) -> tuple[str, str]:
    """One of eight requests on two routes, whole or streamed: its text and its finish reason."""
    path, stream = (COMPLETIONS, CHAT)[i % 2], i % 4 > 1
    body: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "seed": i % 8, "stream": stream}
    body |= (
        {"prompt": f"number {i % 8}"}
        if path == COMPLETIONS
        else {"messages": [{"role": "user", "content": f"number {i % 8}"}]}
    )
    answer = server.post(path, body, timeout=120)
    assert answer.status == 200, answer.body
    if not stream:
        choice = answer.json["choices"][0]
        return choice["text"] if path == COMPLETIONS else choice["message"]["content"], choice["finish_reason"]
    choices = [chunk["choices"][0] for chunk in answer.events[:-1]]
    pieces = [c["text"] if path == COMPLETIONS else c["delta"].get("content", "") for c in choices]
    return "".join(pieces), choices[-1]["finish_reason"]


# ---- those that drip, and those that never read --------------------------------------------------------------------------------------


@contextmanager
def dripping(server: Server, num: int) -> Iterator[None]:
    """Connections that send a byte now and then: half of them in a head that never ends, half in a body."""
    begins = [
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        head(COMPLETIONS, 30_000) + b'{"prompt": "',
    ]
    connections = [server.connect() for _ in range(num)]
    for i, connection in enumerate(connections):
        connection.sendall(begins[i % 2])
    is_over = threading.Event()

    def drip() -> None:
        while not is_over.wait(0.5):
            for connection in connections:
                with suppress(OSError):  # the server has had enough of it
                    connection.send(b"a")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        for connection in connections:
            connection.close()


@contextmanager
def deaf(server: Server, num: int) -> Iterator[list[socket.socket]]:
    """Connections that ask for streams of a hundred kilobytes and never read."""
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60, "ignore_eos": True, "stream": True}
    data = whole(CHAT, {**body, "logprobs": True, "top_logprobs": 20})
    connections = []
    for _ in range(num):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 600)
        connection.connect((server.host, server.port))
        connection.sendall(data)
        connections.append(connection)
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def test_good_clients_in_bad_company(server: Server) -> None:
    """Five hundred that drip and a hundred that never read: forty good requests beside them get the answers that they get alone."""
    expected = [good_request(server, i) for i in range(8)]
    server.wait_idle()
    before = num_files(server)
    with dripping(server, NUM_DRIPPING), deaf(server, NUM_DEAF) as readers:
        wait_for(lambda: num_files(server) > before + NUM_DRIPPING + NUM_DEAF - 5)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda i: good_request(server, i), range(40)))
        assert answers == [expected[i % 8] for i in range(40)]
        assert server.get("/health").status == 200
        with selectors.DefaultSelector() as selector:
            for reader in readers:
                selector.register(reader, selectors.EVENT_READ)
            wait_for(lambda: len(selector.select(0)) == NUM_DEAF)  # each has something that it does not read
    assert_as_before(server, before)


# ---- those that leave ------------------------------------------------------------------------------------------------------------


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": (COMPLETIONS, {"prompt": "a", "stream": True}),
    "chat": (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}], "stream": True, "logprobs": True, "top_logprobs": 3},
    ),
    "n = 4": (COMPLETIONS, {"prompt": "a", "n": 4, "stream": True}),
    "list": (COMPLETIONS, {"prompt": ["a", "b", [70, 71, 72]], "stream": True}),
    "whole": (COMPLETIONS, {"prompt": ["a", "b"], "n": 2}),
    "long prompt": (COMPLETIONS, {"prompt": [70] * 300, "stream": True}),
    "text to tokenize": (COMPLETIONS, {"prompt": "a" * 6000}),
}
MOMENTS = ("in the head", "in the body", "at once", "after a moment", "in the answer", "saying more", "never")


def cut(server: Server, chance: random.Random) -> tuple[str, str]:
    """One request that ends at some moment, by a reset, an end of file, or half of one; what it was."""
    kind, moment = chance.choice(list(BODIES)), chance.choice(MOMENTS)
    path, body = BODIES[kind]
    data = whole(path, {**body, "max_tokens": chance.randrange(1, 60), "ignore_eos": True})
    data = data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    where = data.index(b"\r\n\r\n") + 4
    with server.connect() as connection:
        if moment == "in the head":
            connection.sendall(data[: chance.randrange(where)])
        elif moment == "in the body":
            connection.sendall(data[: chance.randrange(where, len(data))])
        else:
            connection.sendall(data)
        if moment == "after a moment":
            time.sleep(chance.random() * 0.05)
        elif moment == "saying more":  # behind a last request, while the answer comes
            connection.recv(1000)
            connection.sendall(b"more")
            time.sleep(chance.random() * 0.01)
        elif moment in ("in the answer", "never"):
            left = chance.randrange(1, 4000) if moment == "in the answer" else 1 << 30
            while left > 0 and (piece := connection.recv(min(left, 65536))):
                left -= len(piece)
        end = chance.randrange(3)
        if end == 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif end == 1:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
    return kind, moment


def test_clients_that_leave(server: Server) -> None:
    """A thousand requests cut at random: blocks are free, gauges zero and descriptors closed as before, and answers are what they were."""
    expected = [good_request(server, i) for i in range(8)]
    server.wait_idle()
    before, aborted = num_files(server), server.metric("xllm:requests_aborted_total")
    with ThreadPoolExecutor(12) as pool:
        seen = Counter(pool.map(lambda i: cut(server, random.Random(i)), range(NUM_CUTS)))
    assert {kind for kind, _ in seen} == set(BODIES) and {moment for _, moment in seen} == set(MOMENTS)
    assert_as_before(server, before)
    num_aborted = server.metric("xllm:requests_aborted_total") - aborted
    assert num_aborted > NUM_CUTS / 5, "too few were cut while they ran"
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: good_request(server, i), range(8))) == expected
    assert server.process.poll() is None and "Traceback" not in server.log
