"""Before any route: who may ask, for which host, in what shape. An ASGI wrapper; every response passes it and gets the request's id."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from xllm_core.errors import HttpRefusal
from xllm_core.server.metrics import Metrics
from xllm_core.server.problems import Problem, describe
from xllm_core.server.stream import Message, Receive, Send

CLIENT_GONE = 499  # as nginx counts it; nobody reads it
MAX_HEADERS = 100
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/health/startup", "/ping", "/version"})
"""What needs no key. Paths are compared whole, never by their beginning."""

_LABEL = re.compile(rb"[\x21-\x7e]{1,128}")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]", "::1", ""})
App = Callable[[Message, Receive, Send], Awaitable[None]]
_log = logging.getLogger("xllm.access")


def headers_too_large(max_header_bytes: int) -> HttpRefusal:
    """The refusal, wherever it is noticed."""
    text = f"the request's line and headers are larger than {max_header_bytes} bytes ([server] max_header_bytes)"
    return HttpRefusal(text, status=431, code="headers_too_large", should_close=True)


class ApiKeys:
    """Keys as digests. `tenant` compares with every one of them, in constant time each."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in dict.fromkeys(keys)]

    def __len__(self) -> int:
        return len(self._digests)

    def tenant(self, key: bytes) -> str | None:
        """Who this key stands for: "" with a single key, else a name of its own; None if it is no key of ours."""
        given, found = _digest(key), None
        for digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = digest
        if found is None:
            return None
        return found.hex()[:16] if len(self._digests) > 1 else ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    """Wraps the application. Puts `request_id`, `label` and `tenant` into `scope["state"]`.

    allowed_hosts: names of a Host header that are served where no key is set; None serves every name. routes: paths for metrics.
    max_header_bytes: of line and headers together, those that came in one piece too, which h11 does not measure.
    """

    def __init__(
        self, app: App, *, keys: ApiKeys, has_open_metrics: bool, allowed_hosts: Sequence[str] | None, metrics: Metrics,
        routes: Callable[[], frozenset[str]], logs_requests: bool, max_header_bytes: int,
    ) -> None:  # fmt: skip
        self._app = app
        self._keys = keys
        self._open_paths = OPEN_PATHS | ({"/metrics"} if has_open_metrics else set())
        self._hosts = _LOCAL_HOSTS | set(allowed_hosts) if allowed_hosts is not None else None
        self._metrics = metrics
        self._routes = routes
        self._logs_requests = logs_requests
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        label = headers.get(b"x-request-id", b"")
        state = scope.setdefault("state", {})
        state["request_id"] = secrets.token_hex(12)  # ours, always unique; what the client calls it is a label
        state["label"] = label.decode("latin-1") if _LABEL.fullmatch(label) else state["request_id"]
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", state["label"].encode("latin-1"))]
            await send(message)

        try:
            state["tenant"] = self._check(scope, headers)
        except HttpRefusal as error:
            self._metrics.refused(error.code or "refused")
            await send_problem(describe(error), send_named)
        else:
            try:
                await self._app(scope, receive, send_named)
            except asyncio.CancelledError:  # the server ends, and what it was reading is not whole yet
                if not status:
                    text = "the server is shutting down; ask another"
                    await send_problem(
                        describe(HttpRefusal(text, status=503, code="shutting_down", should_close=True)), send_named
                    )
            except Exception:  # the application has answered and logged it; raised again, it would only be logged twice
                if not status:
                    raise
        finally:
            path = scope["path"] if scope["path"] in self._routes() else "other"
            status = status or CLIENT_GONE
            self._metrics.responded(_method(scope), path, status)
            if self._logs_requests:
                took_ms = (time.monotonic() - started_s) * 1e3
                _log.info(
                    "%s %s %s %s %d %.1f ms", state["request_id"], state["label"], _method(scope), path, status, took_ms
                )

    def _check(self, scope: Message, headers: dict[bytes, bytes]) -> str:
        """The tenant; raises HttpRefusal."""
        size = (
            len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) + 4 for k, v in scope["headers"])
        )
        if size > self._max_header_bytes:
            raise headers_too_large(self._max_header_bytes)
        if len(scope["headers"]) > MAX_HEADERS:
            text = f"{len(scope['headers'])} headers, at most {MAX_HEADERS} are taken"
            raise HttpRefusal(text, status=431, code="too_many_headers", should_close=True)
        if b"transfer-encoding" in headers and b"content-length" in headers:
            text = "both Content-Length and Transfer-Encoding are given; send one of them"
            raise HttpRefusal(text, status=400, code="ambiguous_length", should_close=True)
        if len(self._keys):
            return "" if scope["path"] in self._open_paths else self._tenant(headers)
        if self._hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.startswith("[") and host.endswith("]") else host.rpartition(":")[0] or host
            if name not in self._hosts and host not in self._hosts:
                raise HttpRefusal(
                    f"Host {host[:80]!r} is not served: without an API key only this machine's own names are, so that no web page can reach"
                    " the server through another name; set [server] allowed_hosts or api_keys",
                    status=403, code="host_not_allowed",
                )  # fmt: skip
        return ""

    def _tenant(self, headers: dict[bytes, bytes]) -> str:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")
        tenant = self._keys.tenant(key.strip())
        if tenant is None:
            what = "the API key is not valid" if key else "an API key is needed"
            raise HttpRefusal(f"{what}; send it as Authorization: Bearer KEY", status=401, code="invalid_api_key")
        return tenant


def _method(scope: Message) -> str:
    method: str = scope["method"]
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"


async def send_problem(problem: Problem, send: Send) -> None:
    """A problem as the whole response."""
    body = msgspec.json.encode(problem.body())
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in problem.headers.items()),
    ]
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    start: dict[str, Any] = {"type": "http.response.start", "status": problem.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body, "more_body": False})
