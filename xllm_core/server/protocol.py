"""What stock uvicorn lacks: a time for headers, a bound of connections, and JSON in the answer to what is not HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from xllm_core.errors import HttpRefusal
from xllm_core.server.problems import describe


class ServerProtocol(H11Protocol):
    """One connection. Its transport stands in `scope["state"]["transport"]`, for whoever has to cut it.

    Bind limits with `limited`: uvicorn makes instances itself.
    """

    header_timeout_s = 10.0
    max_header_bytes = 65536
    max_connections = 1024

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, and give it a time for its first request."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
        self._deadline: asyncio.TimerHandle | None = None
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
        """Stop the clock."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; a request that is not whole yet runs against the clock."""
        super().data_received(data)
        if self.transport.is_closing():
            self._unwatch()
        elif self._is_waiting_for_client():
            self._watch()
        else:
            self._unwatch()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 could not read, and close."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        if status == 431:
            text = f"the request's headers are larger than {self.max_header_bytes} bytes ([server] max_header_bytes)"
            self._refuse(HttpRefusal(text, status=431, code="headers_too_large"))
        else:
            self._refuse(HttpRefusal(f"not a valid HTTP request: {error or msg}", status=400, code="invalid_http"))

    def _is_waiting_for_client(self) -> bool:
        """Part of a head has come and not all of it; or an answered request whose body still drips in."""
        if self.conn.their_state is h11.IDLE:
            return bool(self.conn.trailing_data[0])
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _watch(self) -> None:
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

    def _refuse(self, error: HttpRefusal) -> None:
        """Write one response by hand, if none has begun, and close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            problem = describe(error)
            body = json.dumps(problem.body()).encode()
            head = [
                f"HTTP/1.1 {problem.status} {error.code}", "content-type: application/json", f"content-length: {len(body)}",
                "connection: close", *(f"{name.lower()}: {value}" for name, value in problem.headers.items() if name != "Connection"),
            ]  # fmt: skip
            self.transport.write("\r\n".join([*head, "", ""]).encode("latin-1") + body)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def limited(**limits: Any) -> type[ServerProtocol]:
    """A protocol class with these limits: header_timeout_s, max_header_bytes, max_connections."""
    return type("LimitedProtocol", (ServerProtocol,), limits)
