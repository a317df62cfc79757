"""A small server that speaks OpenAI's stream format and does what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

Body = dict[str, Any]
MODEL = "served/tiny"


def chunk(text: str | None, finish_reason: str | None = None, *, is_chat: bool = False, **more: Any) -> bytes:
    """One event with one choice, as xllm sends it."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
    choice |= {"delta": {} if text is None else {"content": text}} if is_chat else {"text": text or ""}
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    return event({"id": "cmpl-1", "object": kind, "created": 1, "model": MODEL, "choices": [choice | more]})


def usage(prompt: int, new: int, cached: int = 0) -> bytes:
    """The chunk that ends a stream with include_usage."""
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    count = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, **details}
    return event({"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [], "usage": count})


def event(data: Any) -> bytes:
    """`data: ...` and a blank line."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def answer(body: Body) -> list[bytes]:
    """A whole good answer: one chunk per token, comments between, usage."""
    prompt = body.get("prompt") or body["messages"][0]["content"]
    num_prompt = len(prompt) if isinstance(prompt, list) else len(prompt.split())
    new = body["max_tokens"]
    is_chat = "messages" in body
    chunks = [chunk(" a", is_chat=is_chat) for _ in range(new - 1)] + [chunk(" b", "length", is_chat=is_chat)]
    role = [event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})] if is_chat else []
    return [b": keep-alive\n\n", *role, *chunks, usage(num_prompt, new, cached=1), DONE]


@dataclass
class FakeServer:
    """bodies: what was asked, in order of arrival. respond: what a request gets, given its number and body: bytes to
    stream, pauses in seconds between, an Event to wait for; or a whole response. An int as last item cuts the connection."""

    respond: Callable[[int, Body], Any] = lambda number, body: answer(body)
    models: Any = field(default_factory=lambda: {"object": "list", "data": [{"id": MODEL, "max_model_len": 4096}]})
    bodies: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0
    url: str = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Any of the two endpoints."""
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        given = self.respond(len(self.bodies) - 1, self.bodies[-1])
        if isinstance(given, web.StreamResponse):
            return given
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            for item in given:
                if isinstance(item, bytes):
                    await response.write(item)
                elif isinstance(item, threading.Event):
                    while not item.is_set():
                        await asyncio.sleep(0.005)
                elif isinstance(item, float):
                    await asyncio.sleep(item)
                elif request.transport is not None:
                    request.transport.abort()
            return response
        finally:
            self.num_running -= 1

    async def version(self, request: web.Request) -> web.Response:
        """As xllm and vLLM answer."""
        return web.json_response({"version": "9.9"})

    async def list_models(self, request: web.Request) -> web.Response:
        """404 where a test took the models away."""
        return web.json_response(self.models) if self.models is not None else web.Response(status=404)

    async def application(self) -> AsyncIterator[None]:
        """Serve until the iterator is closed."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/version", self.version)
        app.router.add_get("/v1/models", self.list_models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield
        await runner.cleanup()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """In a thread of its own, as the command under test brings its own loop."""
    fake = FakeServer()
    loop = asyncio.new_event_loop()
    app = fake.application()
    loop.run_until_complete(anext(app))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    with pytest.raises(StopAsyncIteration):
        loop.run_until_complete(anext(app))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
