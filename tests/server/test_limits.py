"""Sizes, times and numbers: each limit is a setting, holds, and is named in the answer that it causes."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import FLAGS
from tests.server.hostile import check_refusal, exchange
from tests.server.reciting import make_reciting
from tests.server.rig import Answer, Server, serving

pytestmark = pytest.mark.slow

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY_BYTES, CONNECTIONS, RUNNING, QUEUE, WAITING = 20_000, 40, 2, 5, 2
LIMITS = {
    "max-body-bytes": BODY_BYTES, "max-header-bytes": 4096, "header-timeout-s": 1, "body-timeout-s": 1.5, "body-idle-timeout-s": 0.6,
    "keep-alive-timeout-s": 1, "write-timeout-s": 1, "max-connections": CONNECTIONS, "max-queue": QUEUE, "comment-interval-s": 0.3,
    "max-bodies-bytes": 2 * BODY_BYTES, "max-num-seqs": RUNNING, "max-waiting": WAITING, "num-blocks": 1100,
}  # fmt: skip
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 8000, "temperature": 0}
SHORT: dict[str, Any] = {"prompt": "a", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Small limits, short times, two sequences at once, a context of 8192."""
    path: Path = tmp_path_factory.mktemp("strict")
    flags = [part for name, value in LIMITS.items() for part in (f"--{name}", str(value))]
    with serving(make_reciting(path / "model", context=8192), path / "log.txt", *FLAGS, *flags) as running:
        yield running


def receive(connection: socket.socket) -> Answer:
    """All that comes until the connection closes, as one response."""
    raw = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return Answer(int(lines[0].split()[1]), headers, body)


def drip(connection: socket.socket, data: bytes, pause_s: float) -> None:
    """A byte at a time until all is sent or the other side has had enough."""
    with suppress(OSError):
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(pause_s)


# ---- sizes -----------------------------------------------------------------------------------------------------------------------


def padded(num_bytes: int) -> bytes:
    body = json.dumps(SHORT).encode()
    return body + b" " * (num_bytes - len(body))


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_size(strict: Server, is_chunked: bool) -> None:
    """To the byte, declared or counted while it comes; the connection goes on after the refusal."""

    def sent(num_bytes: int) -> bytes:
        body = padded(num_bytes)
        if not is_chunked:
            return f"{HEAD}Content-Length: {num_bytes}\r\n\r\n".encode() + body
        chunks = [body[i : i + 3000] for i in range(0, num_bytes, 3000)]
        pieces = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks]
        return f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + b"".join(pieces) + b"0\r\n\r\n"

    assert exchange(strict, sent(BODY_BYTES)).status == 200
    check_refusal(exchange(strict, sent(BODY_BYTES + 1)), 413, "[server] max_body_bytes")
    check_refusal(exchange(strict, sent(50 * BODY_BYTES)), 413, str(BODY_BYTES))
    with strict.connect() as connection:
        ending = HEAD.replace("POST", "GET").replace(COMPLETIONS, "/version") + "Connection: close\r\n\r\n"
        connection.sendall(sent(3 * BODY_BYTES) + ending.encode())
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"413", b"200"]


def test_all_bodies_together(strict: Server) -> None:
    """Two that stopped on their way hold nearly all there is: a third is asked to come again, and served once they are gone."""
    part = f"{HEAD}Content-Length: {BODY_BYTES}\r\n\r\n".encode() + padded(BODY_BYTES - 10)
    with strict.connect() as one, strict.connect() as two:
        for connection in (one, two):
            connection.sendall(part)
        answer = strict.post(COMPLETIONS, SHORT)
        deadline = time.monotonic() + 0.5
        while answer.status == 200 and time.monotonic() < deadline:
            answer = strict.post(COMPLETIONS, SHORT)
        check_refusal(answer, 503, f"at most {2 * BODY_BYTES} are taken together ([server] max_bodies_bytes)")
        assert answer.error["code"] == "overloaded" and "retry-after" in answer.headers
    deadline = time.monotonic() + 10
    while strict.post(COMPLETIONS, SHORT).status != 200:
        assert time.monotonic() < deadline


def test_lengths_that_lie(strict: Server) -> None:
    """Less than was sent: the rest is no request. More than was sent: 408 when nothing more comes."""
    body = json.dumps(SHORT).encode()
    with strict.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"and more\r\n\r\n")
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"400"]
    with strict.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body) + 1}\r\n\r\n".encode() + body)
        check_refusal(receive(connection), 408, "[server] body_idle_timeout_s = 0.6")


@pytest.mark.parametrize("size", [4096, 100_000, 1_000_000])
def test_header_size(strict: Server, size: int) -> None:
    """Line and headers together, whether they come in one piece or not."""
    data = f"GET /version HTTP/1.1\r\nHost: localhost\r\nX: {'a' * size}\r\n\r\n".encode()
    check_refusal(exchange(strict, data), 431, "4096 bytes ([server] max_header_bytes)")
    with strict.connect() as connection:
        connection.sendall(data[:3000])
        time.sleep(0.05)
        with suppress(OSError):
            connection.sendall(data[3000:])
        check_refusal(receive(connection), 431, "[server] max_header_bytes")
    assert exchange(strict, data.replace(b"a" * size, b"a" * 3900)).status == 200


# ---- times -----------------------------------------------------------------------------------------------------------------------


def test_header_timeout(strict: Server) -> None:
    """A head that is not whole in time, whether nothing more comes or a byte now and then."""
    starts = [b"", b"G", f"{HEAD}X-Slow".encode()]
    connections = [strict.connect() for _ in range(2 * len(starts))]
    writers = []
    for i, connection in enumerate(connections):
        connection.sendall(starts[i % len(starts)])
        if i >= len(starts):
            writers.append(threading.Thread(target=drip, args=(connection, b"A" * 100, 0.1)))
            writers[-1].start()
    for connection in connections:
        check_refusal(receive(connection), 408, "[server] header_timeout_s")
        connection.close()
    for writer in writers:
        writer.join()


def test_header_timeout_of_a_second_request(strict: Server) -> None:
    """On a connection that was good before."""
    with strict.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\nGET /ver")
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"408"] and b"header_timeout_s" in answers


def test_body_timeouts(strict: Server) -> None:
    """A pause that is too long, and a body that drips for too long without one, on past the answer, which its client reads late."""
    head = f"{HEAD}Content-Length: {BODY_BYTES}\r\n\r\n".encode()
    with strict.connect() as connection:
        connection.sendall(head + b'{"prom')
        check_refusal(receive(connection), 408, "[server] body_idle_timeout_s = 0.6")
    with strict.connect() as connection:
        connection.sendall(head)
        # So fast that a byte is unread when the answer is out: a server that closed now would reset the connection.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer = threading.Thread(target=drip, args=(connection, b" " * (BODY_BYTES - 1), 0.0002))
        writer.start()
        check_refusal(receive(connection), 408, "[server] body_timeout_s = 1.5")
        writer.join()


def test_a_refused_body_may_not_drip_for_ever(strict: Server) -> None:
    """The answer is out, the rest of the body is passed over, and the connection ends after header_timeout_s."""
    with strict.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: 1000000\r\n\r\n".encode())
        writer = threading.Thread(target=drip, args=(connection, b" " * 300, 0.1))
        writer.start()
        check_refusal(receive(connection), 413, "max_body_bytes")
        writer.join()


def test_idle_connections_are_closed(strict: Server) -> None:
    """After keep_alive_timeout_s without another request."""
    with strict.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert receive(connection).status == 200


def test_a_stream_over_http_1_0(strict: Server) -> None:
    """Its client knows no chunks: events follow one another, and the end of the connection is their end. Mutation: chunks for everybody."""
    body = json.dumps({**SHORT, "stream": True}).encode()
    with strict.connect() as connection:
        connection.sendall(f"{HEAD.replace('HTTP/1.1', 'HTTP/1.0')}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = receive(connection)
    events = answer.body.decode().split("\n\n")
    assert answer.status == 200 and "transfer-encoding" not in answer.headers
    assert len(events) >= 3 and events[-2:] == ["data: [DONE]", ""] and all(e.startswith("data: ") for e in events[:-1])


def test_a_silent_stream_gets_comments(strict: Server) -> None:
    """While a request waits for its turn its client hears that the server lives; events are not disturbed."""
    with occupied(strict):
        body = json.dumps({**SHORT, "stream": True}).encode()
        with strict.connect() as connection:
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            heard = b""
            while heard.count(b": keep-alive\n\n") < 2:
                piece = connection.recv(65536)
                assert piece, heard
                heard += piece
    assert b"HTTP/1.1 200" in heard and b"data:" not in heard
    strict.wait_idle()


# ---- numbers ---------------------------------------------------------------------------------------------------------------------


def test_connections(strict: Server) -> None:
    """One more than the limit is told so, and when to come again; the place of one that leaves is free."""
    strict.wait_idle()
    crowd: list[socket.socket] = []
    try:
        deadline = time.monotonic() + 20
        while True:  # a crowd that is too slow to come together is partly timed out already
            crowd += [strict.connect() for _ in range(CONNECTIONS)]
            answer = exchange(strict, b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if answer.status == 503:
                break
            assert time.monotonic() < deadline
        assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
        assert (
            answer.error["code"] == "too_many_connections" and f"{CONNECTIONS} connections" in answer.error["message"]
        )
        assert "[server] max_connections" in answer.error["message"]
        large = b" " * 20_000_000  # what was turned away unread may not cost the client its answer
        assert strict.post(COMPLETIONS, large).status == 503
    finally:
        for connection in crowd:
            connection.close()
    deadline = time.monotonic() + 10
    while exchange(strict, b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n").status != 200:
        assert time.monotonic() < deadline


@contextmanager
def occupied(server: Server) -> Iterator[None]:
    """All places taken by requests that take long."""
    server.wait_idle()
    body = json.dumps({**LONG, "stream": True}).encode()
    connections = [server.connect() for _ in range(RUNNING)]
    try:
        for connection in connections:
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert connection.recv(100)
        readers = [threading.Thread(target=read_all, args=(connection,), daemon=True) for connection in connections]
        for reader in readers:
            reader.start()
        yield
    finally:
        for connection in connections:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def read_all(connection: socket.socket) -> None:
    with suppress(OSError):
        while connection.recv(65536):
            pass


def check_full(answer: Answer, setting: str) -> None:
    """429 as SDKs understand it."""
    check_refusal(answer, 429, setting)
    assert answer.error["code"] == "queue_full" and 1 <= int(answer.headers["retry-after"]) <= 60


def wait_waiting(server: Server, num: int) -> None:
    deadline = time.monotonic() + 20
    while server.get("/load").json["num_requests_waiting"] != num:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_queue(strict: Server) -> None:
    """The server's bound and the engine's: 429 with Retry-After, streamed or not; a list of prompts is taken whole or not at all."""
    done = strict.metric("vllm:request_success_total")
    with occupied(strict):
        answers: list[Answer] = []
        waiting = [
            threading.Thread(target=lambda: answers.append(strict.post(COMPLETIONS, SHORT))) for _ in range(WAITING)
        ]
        for thread in waiting:
            thread.start()
        wait_waiting(strict, WAITING)
        for stream in (False, True):
            several = {**SHORT, "prompt": ["a"] * (QUEUE - WAITING + 1), "stream": stream}
            check_full(strict.post(COMPLETIONS, several), f"[server] max_queue = {QUEUE}")
            endless = {**several, "prompt": ["a"] * (QUEUE + 1)}  # which no waiting would help
            check_refusal(strict.post(COMPLETIONS, endless), 400, "[server] max_queue")
            assert strict.get("/load").json["server_load"] == RUNNING + WAITING, "part of a refused list was taken"
            # The engine refuses what the server would still take: before the first token, so it is a plain answer again.
            check_full(strict.post(COMPLETIONS, {**SHORT, "stream": stream}), "[scheduler] max_waiting")
            check_full(strict.post(COMPLETIONS, {**several, "prompt": ["a", "a"]}), "[scheduler] max_waiting")
            wait_waiting(strict, WAITING)
    for thread in waiting:
        thread.join(60)
    assert [answer.status for answer in answers] == [200] * WAITING
    strict.wait_idle()
    assert strict.metric("vllm:request_success_total", finished_reason="length") > 0
    assert strict.metric("vllm:request_success_total") - done >= RUNNING + WAITING
    assert strict.metric("xllm:requests_refused_total", reason="queue_full") >= 4


def test_who_leaves_behind_a_second_request(strict: Server) -> None:
    """A client that has sent another request meanwhile, or part of one, and goes: the first is dropped as well."""
    strict.wait_idle()
    aborted = strict.metric("vllm:request_success_total", finished_reason="abort")
    for following in (b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /ver"):
        body = json.dumps(LONG).encode()
        with strict.connect() as connection:
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            deadline = time.monotonic() + 20
            while not strict.get("/load").json["num_sequences_running"]:
                assert time.monotonic() < deadline
            connection.sendall(following)
            time.sleep(0.1)
        strict.wait_idle(60)
    assert strict.metric("vllm:request_success_total", finished_reason="abort") == aborted + 2, "it ran to its end"


# ---- readers that do not read --------------------------------------------------------------------------------------------------------


def small_connection(server: Server) -> socket.socket:
    """A connection that takes a few kilobytes, so that what is not read stays with the server, whose own buffer grows with the segments."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 600)
    connection.settimeout(30)
    connection.connect((server.host, server.port))
    return connection


def test_a_stream_that_nobody_reads(strict: Server) -> None:
    """Dropped after write_timeout_s, counted, logged by the setting's name; its blocks come back while its client still sits there."""
    strict.wait_idle()
    gone = strict.metric("xllm:clients_gone_total", cause="slow_reader")
    body = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
        "continue_final_message": True,
    }
    raw = json.dumps({**body, "max_tokens": 8000, "logprobs": True, "top_logprobs": 20, "stream": True}).encode()
    with small_connection(strict) as connection:
        connection.sendall(f"{HEAD.replace(COMPLETIONS, CHAT)}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        deadline = time.monotonic() + 60
        while strict.metric("xllm:clients_gone_total", cause="slow_reader") == gone:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        strict.wait_idle()
        received = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
        assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received
    assert "[server] write_timeout_s" in strict.log


def test_a_whole_answer_that_nobody_reads(strict: Server) -> None:
    """Megabytes of one JSON object: the connection ends after write_timeout_s, though it was kept alive."""
    prompts = [[70] * 1500] * 2
    raw = json.dumps({"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 20}).encode()
    with small_connection(strict) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        deadline = time.monotonic() + 60
        while strict.log.count("took nothing of its answer") == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(ConnectionResetError):
            receive(connection)


def test_a_reader_that_is_merely_slow(strict: Server) -> None:
    """One that takes a little now and then gets everything."""
    raw = json.dumps(
        {"prompt": [[70] * 250] * 2, "max_tokens": 0, "echo": True, "logprobs": 20, "return_token_ids": True}
    ).encode()
    with small_connection(strict) as connection:
        connection.sendall(f"{HEAD}Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        received, started_s = b"", time.monotonic()
        while piece := connection.recv(20_000):
            received += piece
            time.sleep(0.02)
    assert time.monotonic() - started_s > LIMITS["write-timeout-s"], "not slow enough to prove anything"
    assert len(json.loads(received.partition(b"\r\n\r\n")[2])["choices"][1]["logprobs"]["tokens"]) == 250
