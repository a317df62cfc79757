"""Server-sent events: one answer as chunks, while it grows. The client that leaves frees its blocks; the client that never reads is dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response

from xllm_core.errors import XllmError
from xllm_core.frontend.serving import Answer, Serving
from xllm_core.server.openai import Reply, echo_text
from xllm_core.server.problems import Problem, describe
from xllm_core.types import CompletionOutput, RequestOutput

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would gather chunks otherwise
)
_log = logging.getLogger("xllm.serve")
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Sent:
    """How much of one sequence is out."""

    num_chars: int = 0
    num_tokens: int = 0
    num_token_chars: int = 0  # of tokens by themselves, as logprobs count them
    has_begun: bool = False
    is_over: bool = False


class Chunks:
    """Cuts what is new of an answer into chunk objects, the same text, tokens and logprobs as the whole answer has."""

    def __init__(self, reply: Reply, answer: Answer) -> None:
        self._reply = reply
        self._answer = answer
        width = reply.job.params.n
        self._sequences = [
            (i * width + output.index, group, output, _Sent())
            for i, group in enumerate(answer.outputs)
            for output in group.outputs
        ]
        kind = "chat.completion.chunk" if reply.job.is_chat else "text_completion"
        self._head = b"data: %b," % _encode(reply.head(kind))[:-1]  # the same in every event

    def new(self) -> Iterator[bytes]:
        """Events for everything that has come since the last call."""
        for index, group, output, sent in self._sequences:
            if not sent.is_over:
                yield from self._sequence(index, group, output, sent)

    def last(self) -> Iterator[bytes]:
        """The usage, if asked for, and the end."""
        if self._reply.job.has_usage:
            yield self._event({"choices": [], "usage": self._reply.usage(self._answer.outputs)})
        yield DONE

    def _sequence(self, index: int, group: RequestOutput, output: CompletionOutput, sent: _Sent) -> Iterator[bytes]:
        job = self._reply.job
        text = "" if job.is_echo_only else output.text[sent.num_chars :]
        end = len(output.token_ids)
        has_tokens = end > sent.num_tokens and (job.num_top is not None or job.has_token_ids)
        finish = output.finish_reason
        if not (text or has_tokens or finish) or (not sent.has_begun and end == 0 and finish is None):
            return
        choice: dict[str, Any] = {"index": index}
        if job.is_chat:
            if not sent.has_begun:
                yield self._event({"choices": [self._role(index, group)]})
            choice["delta"] = {"content": text} if text or finish is None else {}
        else:
            choice["text"] = text if sent.has_begun else echo_text(group, job) + text
        choice["logprobs"] = self._logprobs(group, output, sent, 0 if job.is_echo_only else end)
        choice["finish_reason"] = "length" if job.is_echo_only and finish else finish
        if finish is not None:
            choice["stop_reason"] = None if job.is_echo_only else output.stop_reason
        if job.has_token_ids:
            choice["token_ids"] = [] if job.is_echo_only else output.token_ids[sent.num_tokens : end]
            if not sent.has_begun and not job.is_chat:
                choice["prompt_token_ids"] = group.prompt_token_ids
        sent.num_chars, sent.num_tokens, sent.has_begun = len(output.text), end, True
        sent.is_over = finish is not None
        yield self._event({"choices": [choice]})

    def _logprobs(self, group: RequestOutput, output: CompletionOutput, sent: _Sent, end: int) -> dict[str, Any] | None:
        """Of the tokens that are new; with echo the prompt's come before the first."""
        if self._reply.job.is_echo and not sent.has_begun:
            found = self._reply.echoed(group, output, end)
        else:
            found = self._reply.logprobs(output, sent.num_tokens, end, sent.num_token_chars)
        if found is not None:
            sent.num_token_chars += sum(len(token) for token in found.get("tokens", ()))
        return found

    def _role(self, index: int, group: RequestOutput) -> dict[str, Any]:
        first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return first | ({"prompt_token_ids": group.prompt_token_ids} if self._reply.job.has_token_ids else {})

    def _event(self, rest: dict[str, Any]) -> bytes:
        if self._reply.job.has_usage_always and "usage" not in rest:
            rest["usage"] = self._reply.usage(self._answer.outputs)
        return b"%b%b\n\n" % (self._head, _encode(rest)[1:])


def event(data: dict[str, Any]) -> bytes:
    """One SSE event."""
    return b"data: " + _encode(data) + b"\n\n"


async def wait_whole(answer: Answer) -> None:
    """Until every request of an answer has its end. Raises what ended one of them early, at once."""
    raise_failure(answer)
    while not answer.is_finished:
        await answer.news()
        raise_failure(answer)


def raise_failure(answer: Answer) -> None:
    """Raise what ended an answer early; of a request that failed alone the server's log knows more."""
    if answer.error is not None:
        raise answer.error
    failed = next((group.error for group in answer.outputs if group.error is not None), None)
    if failed is not None:
        raise RuntimeError(failed)


class EventStream(Response):
    """A response. Its status goes out with the first chunk, so that what fails before it is a plain error response.

    refuse: sends a problem as the whole response. write_timeout_s: how long one chunk may wait for a client that does not read.
    comment_interval_s: silence after which a comment keeps proxies from closing the connection; 0 is off.
    """

    def __init__(
        self, reply: Reply, answer: Answer, serving: Serving, *, write_timeout_s: float, comment_interval_s: float,
        refuse: Callable[[Problem, Send], Awaitable[None]], on_gone: Callable[[str], None],
    ) -> None:  # fmt: skip
        super().__init__()
        self._chunks = Chunks(reply, answer)
        self._answer = answer
        self._serving = serving
        self._write_timeout_s = write_timeout_s
        self._comment_interval_s = comment_interval_s
        self._refuse = refuse
        self._on_gone = on_gone
        self._has_begun = False
        self._is_waiting = False  # the writing task, for news
        self._unsent = b""
        self._failure: Exception | None = None
        self._write_part: Callable[[bytes], bool] = lambda part: False
        self._is_silent = False
        self._spoke_s = 0.0
        self._comment_timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Send until the answer, the client or the server ends."""
        self._write_part = scope["state"]["write_part"]  # as `transport`, put there by `server.protocol`
        if self._comment_interval_s:
            self._spoke_s = time.monotonic()
            self._set_comment_timer(self._comment_interval_s)
        writer = asyncio.ensure_future(self._write(send))
        leaver = asyncio.ensure_future(wait_disconnect(receive))
        try:
            await asyncio.wait((writer, leaver), return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                self._on_gone("disconnect")
                return
            if isinstance(error := writer.exception(), TimeoutError):
                self._on_gone("slow_reader")
                _log.warning(
                    "a client took nothing of its stream for %g s ([server] write_timeout_s) and was dropped",
                    self._write_timeout_s,
                )
                cut(scope["state"]["transport"])
            elif error is not None:
                raise error
        finally:
            if self._comment_timer is not None:
                self._comment_timer.cancel()
            self._answer.on_news = None
            self._serving.abort(self._answer)
            for task in (writer, leaver):
                task.cancel()
            await asyncio.gather(writer, leaver, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        try:
            await self._write_answer(send)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001  whatever ended the answer, the client hears that it is over
            problem = describe(error, retry_after_s=self._serving.retry_after_s())
            if not isinstance(error, XllmError):
                _log.error("the stream of request %s failed", self._answer.request_ids[0], exc_info=error)
            if not self._has_begun:
                await self._refuse(problem, send)
                return
            await self._put(send, event(problem.body()))
            await self._put(send, DONE)
        async with asyncio.timeout(self._write_timeout_s):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write_answer(self, send: Send) -> None:
        """What goes out, as it comes. Raises what ended the answer early."""
        answer, chunks = self._answer, self._chunks
        answer.on_news = self._write_at_once
        while True:
            if self._failure is not None:
                raise self._failure
            raise_failure(answer)
            is_finished = answer.is_finished
            pieces, self._unsent = self._unsent + b"".join(chunks.new()), b""
            if pieces:
                await self._put(send, pieces)
            if is_finished:
                await self._put(send, b"".join(chunks.last()))
                return
            self._is_waiting = True
            await answer.news()
            self._is_waiting = False
            if self._is_silent:
                self._is_silent = False
                await self._put(send, COMMENT)

    def _write_at_once(self) -> bool:
        """Write what is new from where it was told, as long as nothing has to be waited for. False leaves it to the writing task, and so
        do beginnings, ends and errors."""
        answer = self._answer
        if not (self._is_waiting and self._has_begun) or self._is_silent or self._unsent:
            return False
        if answer.error is not None or self._failure is not None:
            return False
        is_finished = True
        for group in answer.outputs:
            if group.error is not None:
                return False
            is_finished = is_finished and group.finished
        if is_finished:
            return False
        try:
            pieces = b"".join(self._chunks.new())
            if not pieces:
                return True
            if not self._write_part(pieces):
                self._unsent = pieces
                return False
        except Exception as error:  # noqa: BLE001  the writing task raises it, and nobody else's tokens wait for that
            self._failure = error
            return False
        self._spoke_s = time.monotonic()
        return True

    def _set_comment_timer(self, delay_s: float) -> None:
        self._comment_timer = asyncio.get_running_loop().call_later(delay_s, self._look_for_silence)

    def _look_for_silence(self) -> None:
        """One timer that looks again and again: one set anew for every token would cost more than the token's JSON."""
        left_s = self._spoke_s + self._comment_interval_s - time.monotonic()
        if left_s <= 0:
            self._is_silent = True
            self._answer.wake()
        self._set_comment_timer(left_s if left_s > 0 else self._comment_interval_s)

    async def _put(self, send: Send, piece: bytes) -> None:
        self._spoke_s = time.monotonic()
        if self._has_begun and self._write_part(piece):
            return
        async with asyncio.timeout(self._write_timeout_s):
            if not self._has_begun:
                self._has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            await send({"type": "http.response.body", "body": piece, "more_body": True})


async def wait_disconnect(receive: Receive) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def cut(transport: asyncio.Transport) -> None:
    """Close at once: what the client has not taken is thrown away, by the kernel as well, which would keep megabytes of it for a day."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
