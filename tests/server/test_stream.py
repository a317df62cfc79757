"""Streams written from where a token is told, on a real connection: every byte once and in order, whatever the reader does.

No engine here: tests fill an `Answer` and tell it so, turn by turn of the event loop, as `Serving` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from xllm_core.frontend.serving import Answer, Serving
from xllm_core.server.guard import send_problem
from xllm_core.server.openai import Job, Reply
from xllm_core.server.protocol import limited
from xllm_core.server.stream import COMMENT, EventStream, Message, Receive, Send
from xllm_core.types import CompletionOutput, RequestOutput, SamplingParams

BUFFER_BYTES = 65536  # above which asyncio says that a connection takes no more
PIECE = "aé€😀" * 100
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
LIMIT_S = 10.0


@dataclass
class Stage:
    """One stream and its answer. written: what the connection took at once; left: how often it did not; gone: why clients went."""

    num_prompts: int = 1
    n: int = 1
    num_top: int | None = None
    write_timeout_s: float = LIMIT_S
    comment_interval_s: float = 0.0
    send_bytes: int | None = None
    written: list[int] = field(default_factory=list)
    left: int = 0
    gone: list[str] = field(default_factory=list)
    is_aborted: bool = False

    def __post_init__(self) -> None:
        outputs = [
            RequestOutput(f"r-{i}", "p", [1, 2], [CompletionOutput(j) for j in range(self.n)])
            for i in range(self.num_prompts)
        ]
        self.answer = Answer([output.request_id for output in outputs], outputs)
        job = Job(
            is_chat=False, prompts=[[1, 2]] * self.num_prompts, params=SamplingParams(n=self.n), is_stream=True, has_usage=True,
            has_usage_always=False, num_top=self.num_top, has_token_ids=True, model="m",
        )  # fmt: skip
        self.reply = Reply(job, "id", None)
        self.begun, self.ended = asyncio.Event(), asyncio.Event()
        self.transport: asyncio.Transport | None = None

    @property
    def sequences(self) -> list[CompletionOutput]:
        return [output for group in self.answer.outputs for output in group.outputs]

    def say(self, text: str, only: int | None = None) -> None:
        """One token of this text for every sequence, or for one of them, told as the engine's outputs are."""
        for i, output in enumerate(self.sequences):
            if only is None or i == only:
                output.text += text
                output.token_ids.append(len(output.token_ids))
        self.answer.wake()

    def end(self) -> None:
        for group in self.answer.outputs:
            for output in group.outputs:
                output.finish_reason = "stop"
            group.finished = True
        self.answer.wake()

    def abort(self, answer: Answer) -> None:
        """What `Serving.abort` is for."""
        self.is_aborted = True

    def retry_after_s(self) -> int:
        return 1

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """The application."""
        self.transport = scope["state"]["transport"]
        if self.send_bytes is not None:
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_bytes)
        write_part: Callable[[bytes], bool] = scope["state"]["write_part"]

        def counted(part: bytes) -> bool:
            is_written = write_part(part)
            if is_written:
                self.written.append(len(part))
            else:
                self.left += 1
            return is_written

        scope["state"]["write_part"] = counted
        stream = EventStream(
            self.reply, self.answer, cast(Serving, self), write_timeout_s=self.write_timeout_s, comment_interval_s=self.comment_interval_s,
            refuse=send_problem, on_gone=self.gone.append,
        )  # fmt: skip
        asyncio.get_running_loop().call_soon(self.begun.set)
        try:
            await stream(scope, receive, send)
        finally:
            self.ended.set()


@contextlib.asynccontextmanager
async def connected(*stages: Stage, receive_bytes: int | None = None) -> AsyncIterator[socket.socket]:
    """A client of a server whose requests go to these stages, one after another. Not blocking."""
    waiting = list(stages)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await waiting.pop(0)(scope, receive, send)

    config = uvicorn.Config(cast(Any, app), log_config=None, lifespan="off", ws="none", access_log=False)
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()
    protocol = limited(header_timeout_s=LIMIT_S, write_timeout_s=LIMIT_S)
    server = await loop.create_server(
        lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0, family=socket.AF_INET
    )
    with socket.socket() as client:
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.setblocking(False)
        await loop.sock_connect(client, server.sockets[0].getsockname())
        yield client
    server.close()
    deadline_s = loop.time() + LIMIT_S
    while state.tasks or state.connections:
        assert loop.time() < deadline_s, "the server goes on with a client that has gone"
        await asyncio.sleep(0)


async def ask(client: socket.socket, stage: Stage, more: bytes = b"\r\n") -> None:
    """Send a request, and wait until its stream is there. more: what comes behind the first headers."""
    await asyncio.get_running_loop().sock_sendall(client, HEAD + more)
    await stage.begun.wait()


async def read_until(client: socket.socket, ending: bytes, heard: bytearray | None = None) -> bytes:
    """What comes up to an ending, or the connection's end."""
    heard = bytearray() if heard is None else heard
    async with asyncio.timeout(LIMIT_S):
        while ending not in heard:
            if not (data := await asyncio.get_running_loop().sock_recv(client, 65536)):
                break
            heard += data
    return bytes(heard)


def body_of(raw: bytes) -> bytes:
    """A body in chunks, put together; nothing but chunks may stand in it."""
    rest, body = raw.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        end = int(size, 16)
        body, rest = body + rest[:end], rest[end:]
        assert rest.startswith(b"\r\n"), rest[:80]
        rest = rest[2:]
        if end == 0:
            break
    return body


def events_of(body: bytes) -> list[Any]:
    """Data of each event; comments are left out, and half an event is an error."""
    events = body.split(b"\n\n")
    assert events.pop() == b""
    found = [event.removeprefix(b"data: ") for event in events if event + b"\n\n" != COMMENT]
    assert found.pop() == b"[DONE]"
    return [json.loads(event) for event in found]


def check_whole(stage: Stage, raw: bytes) -> None:
    """What the chunks say is what the answer in one piece says."""
    events = events_of(body_of(raw))
    whole = stage.reply.whole(stage.answer.outputs)
    assert events.pop()["usage"] == whole["usage"]
    for expected in whole["choices"]:
        chunks = [choice for event in events for choice in event["choices"] if choice["index"] == expected["index"]]
        assert "".join(chunk["text"] for chunk in chunks) == expected["text"]
        assert [token for chunk in chunks for token in chunk["token_ids"]] == expected["token_ids"]
        assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def run(test: Coroutine[Any, Any, None]) -> None:
    """On a loop that must have nothing to complain of: what a callback raises would end an engine's connection."""
    complaints: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await test

    asyncio.run(watched())
    assert not complaints


def test_back_pressure() -> None:
    """A reader that stops and goes on, two prompts with two sequences each: the connection is written to by turns from where tokens are
    told and by the writing task, and what arrives is the whole answer. Mutations: `_unsent` dropped, sent twice, or sent behind what is newer.
    """

    async def test() -> None:
        stage = Stage(num_prompts=2, n=2, send_bytes=4096)
        async with connected(stage, receive_bytes=4096) as client:
            await ask(client, stage)
            heard = bytearray()
            for i in range(300):
                stage.say(f"{i}{PIECE}"[: 20 * (i % 50)], None if i % 3 else i % 4)  # some tokens bring no text
                if i % 2:
                    await asyncio.sleep(0)
                if i % 60 > 30:  # reads for a while, and for a while does not
                    with contextlib.suppress(BlockingIOError):
                        heard += client.recv(65536)
            stage.end()
            check_whole(stage, await read_until(client, b"\r\n0\r\n\r\n", heard))
        assert len(stage.written) > 20 and stage.left > 1, "only one way was taken"
        assert not stage.gone

    run(test())


def test_a_reader_that_stops() -> None:
    """Dropped; meanwhile no more is kept for it than the connection's own buffer and one piece, however much is said."""

    async def test() -> None:
        stage = Stage(write_timeout_s=0.3, send_bytes=4096)
        async with connected(stage, receive_bytes=4096) as client:
            await ask(client, stage)
            most = 0
            async with asyncio.timeout(LIMIT_S):
                while not stage.ended.is_set():
                    stage.say(PIECE)
                    assert stage.transport is not None
                    most = max(most, stage.transport.get_write_buffer_size())
                    await asyncio.sleep(0.001)
            assert stage.gone == ["slow_reader"] and stage.is_aborted
            assert len(stage.sequences[0].text.encode()) > 2 * BUFFER_BYTES, "too little was said to prove anything"
            assert BUFFER_BYTES < most < BUFFER_BYTES + 2 * max(stage.written)

    run(test())


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_bytes_behind_a_request(connection: bytes) -> None:
    """A client that sends more while its answer streams gets the answer; whoever tells of tokens meanwhile is not disturbed. Behind a last
    request nothing is read as one. Mutation: the connection is ended where they come, and tokens told in that turn are written to it.
    """

    async def test() -> None:
        stage = Stage()
        async with connected(stage) as client:
            await ask(client, stage, b"Connection: " + connection + b"\r\n\r\n")
            for i in range(100):
                stage.say(str(i))
                if i % 10 == 5:
                    await asyncio.get_running_loop().sock_sendall(client, b"\r\n")
                await asyncio.sleep(0)
            stage.end()
            check_whole(stage, await read_until(client, b"\r\n0\r\n\r\n"))

    run(test())


def test_a_connection_that_was_ended() -> None:
    """Its end was said, its stream goes on for a turn or two: what is told then is dropped, and raises nothing where it is told."""

    async def test() -> None:
        stage = Stage()
        async with connected(stage) as client:
            await ask(client, stage)
            stage.say("a")
            await read_until(client, b'"a"')
            assert stage.transport is not None
            cast(Any, stage.transport.get_protocol()).send_400_response("refused")
            for _ in range(5):
                stage.say("b")
                await asyncio.sleep(0)
            assert b'"b"' not in await read_until(client, b"never")
            await stage.ended.wait()
            assert stage.gone == ["disconnect"] and stage.is_aborted

    run(test())


def test_a_client_that_leaves_between_two_writes() -> None:
    """In the middle of what is told turn by turn."""

    async def test() -> None:
        stage = Stage(n=2)
        async with connected(stage) as client:
            await ask(client, stage)
            stage.say("a")
            await read_until(client, b'"a"')
            client.close()
            async with asyncio.timeout(LIMIT_S):
                while not stage.ended.is_set():
                    stage.say("b")
                    await asyncio.sleep(0)
            stage.say("c")  # still told in that turn, and later
            assert stage.gone == ["disconnect"] and stage.is_aborted

    run(test())


def test_an_answer_that_cannot_be_written() -> None:
    """The error ends the stream, as an error event, and nothing is written behind it, whatever is told before the task has come to it."""

    async def test() -> None:
        stage = Stage(n=2, num_top=1)
        for output in stage.sequences:
            output.logprobs = []
        async with connected(stage) as client:
            await ask(client, stage)
            heard = bytearray()
            stage.sequences[0].text, stage.sequences[0].finish_reason = "first", "stop"
            stage.answer.wake()
            await read_until(client, b"first", heard)
            await asyncio.sleep(0)  # the writing task waits now
            stage.say("broken", 1)  # a token without the logprobs that were asked for
            stage.sequences[1].logprobs = None
            stage.say("later", 1)
            events = events_of(body_of(await read_until(client, b"\r\n0\r\n\r\n", heard)))
        assert events[-1]["error"]["type"] == "internal_server_error" and "later" not in json.dumps(events)

    run(test())


def test_comments_between_events() -> None:
    """While nothing is written, be it that tokens come which bring no text; never within an event. Mutation: tokens count as writing."""

    async def test() -> None:
        stage = Stage(comment_interval_s=0.05)
        stage.reply = Reply(Job(**(vars_of(stage.reply.job) | {"has_token_ids": False})), "id", None)
        async with connected(stage) as client:
            await ask(client, stage)
            stage.say("a")
            heard = bytearray()
            async with asyncio.timeout(LIMIT_S):
                while heard.count(COMMENT) < 2:
                    stage.say("")
                    await asyncio.sleep(0.005)
                    with contextlib.suppress(BlockingIOError):
                        heard += client.recv(65536)
            stage.say("b")
            stage.end()
            body = body_of(await read_until(client, b"\r\n0\r\n\r\n", heard))
            assert "".join(event["choices"][0]["text"] for event in events_of(body)[:-1]) == "ab"

    run(test())


def vars_of(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in Job.__slots__}


def test_two_streams_on_one_connection() -> None:
    """The second, sent ahead, begins when the first has ended; who still tells of the first writes nothing into it."""

    async def test() -> None:
        first, second = Stage(), Stage()
        async with connected(first, second) as client:
            await ask(client, first, b"\r\n" + HEAD + b"\r\n")
            first.say("one")
            await asyncio.sleep(0)
            assert not second.begun.is_set()
            first.end()
            await second.begun.wait()
            await first.ended.wait()
            assert first.answer.on_news is None, "its stream is still held"
            second.say("two")
            await asyncio.sleep(0)
            first.say("late")
            second.say("three")
            second.end()
            raw = bytearray()
            async with asyncio.timeout(LIMIT_S):
                while raw.count(b"\r\n0\r\n\r\n") < 2:
                    raw += await asyncio.get_running_loop().sock_recv(client, 65536)
            one, two = bytes(raw).split(b"\r\n0\r\n\r\n")[:2]
            first.sequences[0].text, first.sequences[0].token_ids = "one", [0]
            check_whole(first, one + b"\r\n0\r\n\r\n")
            check_whole(second, two + b"\r\n0\r\n\r\n")

    run(test())
