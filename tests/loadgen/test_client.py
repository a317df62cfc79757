"""One request and its stream, against a server that keeps to the wire format or breaks it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from tests.loadgen.conftest import DONE, MODEL, FakeServer, answer, chunk, event, usage
from xllm_core.loadgen.client import EventParser, LoadClient, Target
from xllm_core.loadgen.runner import Run, run_load, warm_up
from xllm_core.loadgen.samples import Sample
from xllm_core.loadgen.workload import Ask, Prompts, fixed_lengths, poisson

PROMPTS = Prompts.of_vocabulary(0, 1000)


def load(target: Target, asks: list[Ask], num_clients: int | None = 1) -> Run:
    """Run a load in a loop of its own."""

    async def run() -> Run:
        async with LoadClient(target) as client:
            return await run_load(client, asks, PROMPTS, num_clients=num_clients, show=False)

    return asyncio.run(run())


def one(server: FakeServer, given: list[Any], **more: Any) -> Sample:
    """The sample of one request that is answered with `given`."""
    server.respond = lambda number, body: given
    (sample,) = load(Target(server.url, MODEL, **more), fixed_lengths(1, 5, 3)).samples
    return sample


def test_events_are_cut_anywhere() -> None:
    """Every split of the bytes in two, and byte by byte, gives the same events. Dies if a line waits for its neighbour, or is lost."""
    data = b": comment\r\n\r\ndata: {1}\r\n\r\nevent: x\ndata:{2}\n\n: data: no\n\ndata: \xc3\xa9\n\ndata: [DONE]\n\n"
    expected = [b"{1}", b"{2}", b"\xc3\xa9", b"[DONE]"]
    pieces = [[data[:cut], data[cut:]] for cut in range(len(data))] + [[data[i : i + 1] for i in range(len(data))]]
    for split in pieces:
        parser = EventParser()
        assert [found for piece in split for found in parser.feed(piece)] == expected


def test_a_good_answer(server: FakeServer) -> None:
    """Chunks with text or tokens are timed, others are not; the server's counts are kept. Dies if an empty chunk is a first token."""
    sample = one(
        server,
        [
            b": keep-alive\n\n",
            event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
            chunk(""),
            0.1,
            chunk("x"),
            chunk(None, token_ids=[7]),
            event({"choices": [{"index": 0, "delta": {"content": "y"}}], "usage": None, "error": None}),
            0.1,
            chunk(None, "length"),
            usage(5, 3, cached=4),
            DONE,
        ],
    )
    assert (sample.outcome, sample.status, sample.error, sample.finish_reason) == ("ok", 200, "", "length")
    assert (sample.prompt_tokens, sample.cached_tokens, sample.output_tokens, len(sample.chunk_s)) == (5, 4, 3, 3)
    assert sample.ttft_s is not None and sample.end_s is not None and sample.sent_s is not None
    assert sample.sent_s >= 0 and sample.ttft_s >= 0.1 and sample.end_s >= 0.2
    assert sample.chunk_s == sorted(sample.chunk_s) and sample.chunk_s[-1] <= sample.end_s


def refusal(number: int, body: dict[str, Any]) -> web.Response:
    """As OpenAI refuses."""
    error = {"message": "queue is full", "type": "rate_limit_error", "param": None, "code": None}
    return web.json_response({"error": error}, status=429)


@pytest.mark.parametrize(
    ("respond", "kind", "status", "words"),
    [
        (refusal, "http", 429, "queue is full"),
        (lambda n, b: web.Response(status=502, text="<html>bad gateway"), "http", 502, "<html>bad gateway"),
        (lambda n, b: web.Response(status=307, headers={"Location": "/v1/completions"}), "http", 307, ""),
        (lambda n, b: web.json_response({"choices": []}), "protocol", 200, "application/json"),
        (lambda n, b: [chunk("a"), event({"error": {"message": "it broke"}}), DONE], "stream", 200, "it broke"),
        (lambda n, b: [event({"error": "it broke"}), DONE], "stream", 200, "it broke"),
        (lambda n, b: [chunk("a"), b"data: {nonsense\n\n", DONE], "protocol", 200, "nonsense"),
        (lambda n, b: [b'data: {"choices": 3}\n\n', DONE], "protocol", 200, "choices"),
        (lambda n, b: [chunk("a"), usage(1, 1)], "disconnect", 200, "without [DONE]"),
        (lambda n, b: [chunk("a"), 0.05, 0], "disconnect", 200, "ClientPayloadError"),
        (lambda n, b: [chunk("a"), 1.0, DONE], "timeout", 200, ""),
    ],
)
def test_what_goes_wrong_is_named(
    server: FakeServer, respond: Callable[[int, dict[str, Any]], Any], kind: str, status: int, words: str
) -> None:
    """Each in its kind, with the status and the server's words. Dies if a broken stream passes for an answer."""
    server.respond = respond
    (sample,) = load(Target(server.url, MODEL, timeout_s=0.4), fixed_lengths(1, 5, 3)).samples
    assert (sample.outcome, sample.error, sample.status) == ("failed", kind, status), sample
    assert words in sample.message
    assert sample.sent_s is not None and sample.end_s is not None


def test_no_server(server: FakeServer) -> None:
    """Nothing was sent, so nothing is timed."""
    (sample,) = load(Target("http://127.0.0.1:1", MODEL), fixed_lengths(1, 5, 3)).samples
    assert (sample.outcome, sample.error, sample.sent_s, sample.end_s) == ("failed", "connect", None, None)


def test_what_is_asked(server: FakeServer) -> None:
    """The body, for ids, text and chat, with fields put in and taken out. Dies if usage or the stream is not asked for."""
    plain = Target(server.url + "/v1/", MODEL, extra={"ignore_eos": True, "temperature": None, "top_k": 3})
    text = replace(plain, prompt_mode="text", headers={"Authorization": "Bearer k"})
    for target in (plain, text, replace(text, endpoint="chat")):
        assert load(target, fixed_lengths(1, 5, 3)).samples[0].outcome == "ok"
    ids, words, chat = server.bodies
    common = {
        "model": MODEL, "max_tokens": 3, "ignore_eos": True, "top_k": 3, "stream": True, "stream_options": {"include_usage": True}
    }  # fmt: skip
    assert ids == {**common, "prompt": PROMPTS.ids(Ask(0, 5, 3))}
    assert words == {**common, "prompt": PROMPTS.text(Ask(0, 5, 3))} and len(words["prompt"].split()) == 5
    assert chat == {**common, "messages": [{"role": "user", "content": words["prompt"]}]}
    assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer k", "Bearer k"]


def until(condition: Callable[[], bool], then: threading.Event) -> threading.Thread:
    """Set an event once a condition holds; after 30 s anyway, so that a broken client fails and does not hang."""

    def wait() -> None:
        end_s = time.monotonic() + 30
        while not condition() and time.monotonic() < end_s:
            time.sleep(0.005)
        then.set()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_closed_loop(server: FakeServer) -> None:
    """Three clients keep three requests running, never more. Dies if they wait for each other, or all is sent at once."""
    gate = threading.Event()
    server.respond = lambda number, body: [gate, *answer(body)]
    thread = until(lambda: server.num_running == 3, gate)
    run = load(Target(server.url, MODEL), fixed_lengths(10, 5, 3), num_clients=3)
    thread.join()
    assert server.max_running == 3
    assert sorted(sample.index for sample in run.samples) == list(range(10))
    assert {sample.outcome for sample in run.samples} == {"ok"}
    assert run.duration_s > 0 and run.client_cpu_s > 0


def test_open_loop_waits_for_no_answer(server: FakeServer) -> None:
    """All are sent while none is answered, none before its time. Dies if arrivals wait for a free client."""
    gate = threading.Event()
    server.respond = lambda number, body: [gate, *answer(body)]
    asks = poisson(fixed_lengths(12, 5, 3), rate=100.0, seed=0)
    thread = until(lambda: server.num_running == 12, gate)
    run = load(Target(server.url, MODEL), asks, num_clients=None)
    thread.join()
    assert server.max_running == 12
    assert [sample.index for sample in run.samples] == list(range(12))
    for sample, ask in zip(run.samples, asks, strict=True):
        assert sample.outcome == "ok" and sample.due_s == ask.due_s
        assert sample.lag_s is not None and sample.lag_s >= 0


def test_one_failure_leaves_the_others_alone(server: FakeServer) -> None:
    """In both loops. Dies if an error ends the run."""
    for num_clients, asks in ((2, fixed_lengths(6, 5, 3)), (None, poisson(fixed_lengths(6, 5, 3), 500.0, 0))):
        server.bodies.clear()
        server.respond = lambda number, body: refusal(number, body) if number == 1 else answer(body)
        run = load(Target(server.url, MODEL), list(asks), num_clients=num_clients)
        assert sorted(sample.outcome for sample in run.samples) == ["failed"] + ["ok"] * 5


def test_warm_up_stops_at_the_first_failure(server: FakeServer) -> None:
    """And asks for few tokens."""

    async def run() -> Sample | None:
        async with LoadClient(Target(server.url, MODEL)) as client:
            return await warm_up(client, fixed_lengths(3, 5, 30), PROMPTS)

    assert asyncio.run(run()) is None
    assert [body["max_tokens"] for body in server.bodies] == [4, 4, 4]
    server.respond = refusal
    failed = asyncio.run(run())
    assert failed is not None and failed.status == 429 and len(server.bodies) == 4
