"""Reading a JSON body: bounded in bytes, time and depth, and strict, so that what is not plain JSON is a 400 with its place."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from xllm_core.errors import HttpRefusal, InvalidRequestError
from xllm_core.frontend.validation import shown

MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # half a second of parsing, during which nothing else is answered
_LARGE_BYTES = 1 << 18

Receive = Callable[[], Awaitable[Any]]


@dataclass(slots=True)
class BodyLimits:
    """Of `[server]`. held_bytes: of all bodies that are being read or understood now; `Lease` counts them."""

    max_body_bytes: int
    max_bodies_bytes: int
    body_timeout_s: float
    body_idle_timeout_s: float
    held_bytes: int = 0


class Lease:
    """What one request holds of the memory for bodies, as a context: from its first byte until something was made of it."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Count bytes that came. Raises HttpRefusal (503) when all bodies together are too much."""
        limits = self._limits
        if num_bytes and limits.held_bytes + num_bytes > limits.max_bodies_bytes:
            raise HttpRefusal(
                f"the bodies of the requests under way hold {limits.held_bytes} bytes, and at most {limits.max_bodies_bytes} are taken together "
                "([server] max_bodies_bytes); try again later",
                status=503, code="overloaded",
            )  # fmt: skip
        limits.held_bytes += num_bytes
        self._num_bytes += num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._limits.held_bytes -= self._num_bytes


class ClientGone(Exception):
    """The connection closed before the request was whole; nobody is there to answer."""


async def read_body(headers: dict[bytes, bytes], receive: Receive, limits: BodyLimits, lease: Lease) -> bytes:
    """The whole body of a request that says it is JSON; `parse_object` reads it. Raises HttpRefusal (408, 413, 415, 503), ClientGone."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise HttpRefusal(
            f"Content-Type is {shown(kind.decode('latin-1'))}; send the body as application/json",
            status=415, code="unsupported_media_type",
        )  # fmt: skip
    if b"content-encoding" in headers:
        raise HttpRefusal(
            "Content-Encoding is not supported; send the body as it is", status=415, code="unsupported_media_type"
        )  # fmt: skip
    declared = int(headers.get(b"content-length", b"0"))
    if declared > limits.max_body_bytes:
        raise _too_large(declared, limits)
    body, more = bytearray(), True
    deadline_s = time.monotonic() + limits.body_timeout_s
    while more:
        left_s = deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(min(left_s, limits.body_idle_timeout_s)):
                message = await receive()
        except TimeoutError:
            raise _too_slow(len(body), left_s <= limits.body_idle_timeout_s, limits) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        if len(body) + len(piece) > limits.max_body_bytes:
            raise _too_large(len(body) + len(piece), limits)
        lease.grow(len(piece))
        body += piece
        more = message.get("more_body", False)
    return bytes(body)


def _too_large(size: int, limits: BodyLimits) -> HttpRefusal:
    return HttpRefusal(
        f"the body has {size} bytes or more, at most {limits.max_body_bytes} are taken ([server] max_body_bytes)",
        status=413, code="body_too_large",  # the connection stays: what still comes is passed over, else the client never gets to reading this
    )  # fmt: skip


def _too_slow(num_bytes: int, is_total: bool, limits: BodyLimits) -> HttpRefusal:
    setting, limit_s = (
        ("body_timeout_s", limits.body_timeout_s) if is_total else ("body_idle_timeout_s", limits.body_idle_timeout_s)
    )
    return HttpRefusal(
        f"the body did not come in time: {num_bytes} bytes, then nothing more within [server] {setting} = {limit_s:g}",
        status=408, code="body_timeout", should_close=True,
    )  # fmt: skip


def parse_object(raw: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, no NaN or Infinity, no key twice, no half of a surrogate pair, at most `MAX_DEPTH` deep, an object at the top."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body is not valid UTF-8: byte {raw[error.start]:#04x} at offset {error.start}"
        ) from None
    num_values = raw.count(b",") if len(raw) > _LARGE_BYTES else 0
    if num_values > MAX_VALUES:
        raise InvalidRequestError(
            f"the body holds some {num_values} values, at most {MAX_VALUES} are taken; split the request"
        )
    if num_values:
        gc.disable()  # it would walk millions of new lists again and again, and find nothing
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise InvalidRequestError(f"the body is not valid JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # an integer of thousands of digits
        raise InvalidRequestError("the body holds an integer of thousands of digits; give a smaller one") from None
    finally:
        if num_values:
            gc.enable()
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the body is a JSON {_kind(value)}; send an object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if b"\\u" in raw and b"\\ud" in raw.lower():
        _check_surrogates(value)
    return value


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"the body holds {name}, which is not JSON; numbers must be finite")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        param = twin[:64].encode(errors="replace").decode()  # the answer must be valid Unicode, whatever the key was
        raise InvalidRequestError(f"the key {shown(twin)} stands twice in one object; keep one", param=param)
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"the body is nested deeper than {MAX_DEPTH} levels; flatten it")


def _check_surrogates(value: Any, path: str = "") -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            where = path or "the body"
            raise InvalidRequestError(
                f"{where} holds half of a surrogate pair at character {error.start}, which is not valid Unicode; remove it",
                param=path.partition(".")[0] or None,
            ) from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_surrogates(key, path)
            _check_surrogates(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_surrogates(inner, f"{path}[{i}]")


def _kind(value: object) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
