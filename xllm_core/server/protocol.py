"""What stock uvicorn lacks: a time for headers, a bound of connections, an end of readers that never read, JSON where HTTP is broken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from xllm_core.errors import HttpRefusal
from xllm_core.server.guard import headers_too_large
from xllm_core.server.problems import describe
from xllm_core.server.stream import cut

_LINGER_S = 2.0
_CHUNK_BYTES = 5  # the shortest header and footer that a chunk can have
_log = logging.getLogger("xllm.serve")


class CountingConnection(h11.Connection):
    """Bounds the framing of a body as its headers are bounded: a chunk costs as much time as a header, however few bytes it brings."""

    def __init__(self, role: type[h11.SERVER], max_framing_bytes: int) -> None:
        super().__init__(role, max_framing_bytes)
        self._max_framing_bytes = max_framing_bytes
        self._num_framing_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next part of a request. Raises RemoteProtocolError for what is not one."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_framing_bytes = 0
        elif isinstance(event, h11.Data) and event.chunk_start:
            self._num_framing_bytes += _CHUNK_BYTES
            if self._num_framing_bytes > self._max_framing_bytes:
                text = f"the body comes in too many chunks; those of one request may have {self._max_framing_bytes} bytes of headers"
                raise h11.RemoteProtocolError(f"{text} ([server] max_header_bytes)")
        return event


class _AnsweringTransport:
    """What a request writes its answer to. Its end is the protocol's business: the client may still be sending."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, close


class ServerProtocol(H11Protocol):
    """One connection. Its transport stands in `scope["state"]["transport"]`, for whoever has to cut it, and `write_part` under its name.

    Bind limits with `limited`: uvicorn makes instances itself.
    """

    header_timeout_s = 10.0
    write_timeout_s = 30.0
    max_header_bytes = 65536
    max_connections = 1024

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, and give it a time for its first request."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport, "write_part": self.write_part}
        self._deadline: asyncio.TimerHandle | None = None
        self._unsent_check: asyncio.TimerHandle | None = None
        self._is_ending = False
        self._answering = _AnsweringTransport(transport, self._close_answered)
        self.conn = CountingConnection(h11.SERVER, self.max_header_bytes)
        if len(self.connections) > self.max_connections:
            self._refuse(
                HttpRefusal(
                    f"{self.max_connections} connections are open already ([server] max_connections); try again later",
                    status=503, code="too_many_connections",
                )
            )  # fmt: skip
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._unwatch()
        if self._unsent_check is not None:
            self._unsent_check.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; a request that is not whole yet runs against the clock."""
        if self._is_ending or self.conn.their_state is h11.MUST_CLOSE:
            return  # read, so that the client gets to reading its answer; behind its last request nothing is one
        super().data_received(data)
        if len(self.conn.trailing_data[0]) < self.max_header_bytes:
            self.flow.resume_reading()  # stopped for a request that waits behind another, it would not notice that the client leaves
        self._set_clock()

    def handle_events(self) -> None:
        """Give what was parsed to the application, and each new request the transport that ends well."""
        super().handle_events()
        if self.cycle is not None:
            self.cycle.transport = self._answering  # type: ignore[assignment]

    def write_part(self, part: bytes) -> bool:
        """Write a part of a body that has begun, past the application's layers, which would add time and nothing else. False, and nothing
        written, where that is not possible now: before the body, behind a client that does not read or has gone, or to HTTP/1.0.
        """
        conn = self.conn
        if (
            conn.our_state is not h11.SEND_BODY
            or self._is_ending  # the end was said already
            or self.transport.is_closing()
            or self.flow.write_paused
            or conn.their_http_version != b"1.1"
            or not part
        ):
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))  # as h11 frames a body of unknown length
        return True

    def on_response_complete(self) -> None:
        """A response went out, as far as the client takes it."""
        if self._is_ending:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        self._set_clock()
        self._watch_unsent(self.transport.get_write_buffer_size())

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: whoever asks for another protocol gets this one, and no advice belongs in the log."""

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 could not read, and close."""
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) == 431:
            self._refuse(headers_too_large(self.max_header_bytes))
            return
        reason = str(error or msg).partition(": bytearray")[0]  # where h11 shows what the client sent
        self._refuse(HttpRefusal(f"not a valid HTTP request: {reason}", status=400, code="invalid_http"))

    def _set_clock(self) -> None:
        if self._is_ending:
            return
        if self._is_waiting_for_client() and not self.transport.is_closing():
            self._watch()
        else:
            self._unwatch()

    def _is_waiting_for_client(self) -> bool:
        """Part of a head has come and not all of it; or an answered request whose body still drips in."""
        if self.conn.their_state is h11.IDLE:
            return bool(self.conn.trailing_data[0])
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _watch(self) -> None:
        self._unset_keepalive_if_required()
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_timeout_s, self._too_late)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        text = f"no whole request came within {self.header_timeout_s:g} s ([server] header_timeout_s)"
        self._refuse(HttpRefusal(text, status=408, code="header_timeout"))

    def _watch_unsent(self, num_bytes: int) -> None:
        """Look again later whether the client has taken anything of what waits for it."""
        if num_bytes and self._unsent_check is None:
            self._unsent_check = self.loop.call_later(self.write_timeout_s, self._drop_if_stuck, num_bytes)

    def _drop_if_stuck(self, num_before: int) -> None:
        self._unsent_check = None
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes >= num_before and self.cycle.response_complete:
            _log.warning(
                "a client took nothing of its answer for %g s ([server] write_timeout_s) and was dropped",
                self.write_timeout_s,
            )
            cut(self.transport)
        else:
            self._watch_unsent(num_bytes)

    def _refuse(self, error: HttpRefusal) -> None:
        """Write one response by hand, if none has begun, and close."""
        if self.transport.is_closing() or self._is_ending:
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_written(error))
        if self.cycle is not None:
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
            self.cycle.message_event.set()
        self._linger()

    def _close_answered(self) -> None:
        """The end of a connection whose last answer is out; of one whose request is not all here yet, in peace."""
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Say that nothing more comes, and pass over for a while what does. Closed at once, a connection with unread data is reset, and
        the client may never see its answer."""
        self._is_ending = True
        self.connections.discard(self)  # those that were turned away keep nobody out
        self._unwatch()
        self._unset_keepalive_if_required()
        with contextlib.suppress(OSError):  # the client has gone already
            self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.abort)


def _written(error: HttpRefusal) -> bytes:
    problem = describe(error)
    body = msgspec.json.encode(problem.body())
    headers = {name.lower(): value for name, value in problem.headers.items()} | {
        "content-type": "application/json", "content-length": str(len(body)), "connection": "close",
    }  # fmt: skip
    head = [
        f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
        "",
        "",
    ]
    return "\r\n".join(head).encode("latin-1") + body


def limited(**limits: Any) -> type[ServerProtocol]:
    """A protocol class with these limits: header_timeout_s, write_timeout_s, max_header_bytes, max_connections."""
    return type("LimitedProtocol", (ServerProtocol,), limits)
