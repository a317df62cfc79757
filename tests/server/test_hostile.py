"""Hundreds of requests that are wrong, each in its own way: every one gets its 4xx with a reason, and nothing else happens.

Watched over the whole file: the processes are the same afterwards, a greedy answer is unchanged, no 5xx was counted, no traceback was
logged, and nothing is left running or held.
"""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server import hostile
from tests.server.hostile import CHAT, COMPLETIONS, Case, check_refusal, exchange
from tests.server.rig import JSON, Answer, Server

pytestmark = pytest.mark.slow

CANARY = {"prompt": "canary", "max_tokens": 24, "temperature": 0, "logprobs": 2}
TABLE = [
    case
    for table in (hostile.numbers, hostile.token_ids, hostile.prompts, hostile.messages, hostile.fields, hostile.bodies)
    for case in table()
]


def answer_of(server: Server) -> Any:
    return server.post(COMPLETIONS, CANARY).json["choices"]


def num_server_errors(server: Server) -> float:
    return sum(v for name, v in server.metrics().items() if name.startswith("http_requests") and 'status="5' in name)


@pytest.fixture(scope="module")
def target(server: Server) -> Iterator[Server]:
    """The shared server, looked at before and after."""
    server.wait_idle()
    before = answer_of(server), server.engine_pids, num_server_errors(server), len(server.log)
    yield server
    assert server.process.poll() is None
    for pid in server.engine_pids:
        os.kill(pid, 0)
    load = server.wait_idle()
    assert (answer_of(server), server.engine_pids, num_server_errors(server)) == before[:3]
    assert "Traceback" not in server.log[before[3] :]
    assert load["num_requests_waiting"] == 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"):
        assert server.metric(f"vllm:{name}") == 0, name


def test_the_table_is_large_and_varied() -> None:
    """Each request once."""
    requests = {(case.path, case.body, *case.headers.items()) for case in TABLE}
    assert len(requests) == len(TABLE) >= 500


def send(server: Server, case: Case, body: str | bytes) -> Answer:
    raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    return server.request("POST", case.path, raw, headers={**JSON, **case.headers})


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_bodies(target: Server, case: Case) -> None:
    """Refused before the first byte of an answer, with `stream` as without: never as an event after a 200."""
    bodies = [case.body]
    can_stream = case.path in (COMPLETIONS, CHAT) and isinstance(case.body, str) and '"stream"' not in case.body
    if can_stream and "prompt_logprobs" not in case.name:
        bodies.append(case.body[:-1] + (', "stream": true}' if len(case.body) > 2 else '"stream": true}'))
    for body in bodies:
        answer = send(target, case, body)
        if case.status != 200:
            check_refusal(answer, case.status, case.word)
        elif body is case.body and '"stream": true' not in case.body:
            assert answer.status == 200 and "error" not in answer.json, answer.body[:500]
        else:
            assert answer.status == 200 and answer.events[-1] == "[DONE]", answer.body[:500]
            assert not any("error" in event for event in answer.events[:-1]), answer.events


@pytest.mark.parametrize(("method", "path"), hostile.ROUTES)
def test_routes(target: Server, method: str, path: str) -> None:
    """What is not there is a 404 or 405 in the same shape; a 405 says what is allowed."""
    answer = target.request(method, path, hostile.GOOD[COMPLETIONS] if method == "POST" else None)
    status = hostile.ROUTES[method, path]
    check_refusal(answer, status, "")
    assert status == 404 or answer.headers["allow"]


@pytest.mark.parametrize("name", hostile.RAW)
def test_bytes_that_are_not_a_request(target: Server, name: str) -> None:
    """Whatever comes over the wire is answered in JSON, and the connection is closed where nothing after it could be read."""
    data, status, word = hostile.RAW[name]
    check_refusal(exchange(target, data.encode("latin-1")), status, word)


@pytest.mark.parametrize("name", hostile.ODD_BUT_GOOD)
def test_odd_requests_that_are_served(target: Server, name: str) -> None:
    """Rare but valid HTTP."""
    assert exchange(target, hostile.ODD_BUT_GOOD[name].encode("latin-1")).status == 200


def test_random_bytes(target: Server) -> None:
    """A hundred connections of noise, some after a good beginning: an error in our shape, or a closed connection."""
    noise = random.Random(0)
    begins = [
        b"",
        b"POST /v1/completions HTTP/1.1\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
    ]
    for i in range(100):
        with target.connect() as connection:
            connection.sendall(begins[i % 3] + noise.randbytes(noise.randrange(1, 3000)) + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert not answer or re.match(rb"HTTP/1.1 (200|4\d\d) ", answer), answer[:200]
        assert answer.count(b"HTTP/1.1 2") <= 1


def test_a_thousand_requests_in_one_go(target: Server) -> None:
    """Pipelined: each is answered, in order."""
    one = b"GET /v1/models/%d HTTP/1.1\r\nHost: localhost\r\n"
    data = b"".join(one % i + (b"Connection: close\r\n" if i == 999 else b"") + b"\r\n" for i in range(1000))
    with target.connect() as connection:
        connection.sendall(data)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"model '(\d+)' does not exist", answer) == [b"%d" % i for i in range(1000)]


def test_one_request_id_for_all(target: Server) -> None:
    """Fifty requests at once under one name: it comes back as a label, each gets its own answer."""
    name = {"X-Request-Id": "the-same"}

    def ask(i: int) -> Answer:
        body = {
            "prompt": [70 + i % 25],
            "max_tokens": 6,
            "temperature": 0,
            "return_token_ids": True,
            "request_id": "the-same",
        }
        return target.post(COMPLETIONS, body, headers=name)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(50)))
    assert {a.headers["x-request-id"] for a in answers} == {"the-same"} and len({a.json["id"] for a in answers}) == 50
    for i, answer in enumerate(answers):
        assert answer.json["choices"][0]["prompt_token_ids"] == [70 + i % 25]
        assert answer.json["choices"][0]["token_ids"] == answers[i % 25].json["choices"][0]["token_ids"]


@pytest.mark.parametrize("label", ["a b", "x" * 129, "tab\there", "\xe9", ""])
def test_request_ids_that_are_no_names(target: Server, label: str) -> None:
    """Not repeated in headers or logs; the server's own id stands there."""
    answer = target.get("/version", headers={"X-Request-Id": label.encode("latin-1")})
    assert answer.status == 200 and re.fullmatch("[0-9a-f]{24}", answer.headers["x-request-id"])
