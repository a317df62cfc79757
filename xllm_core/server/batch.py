"""OpenAI batch files: one request per line in, one result per line out, in any order, and again from where it stopped.

A line that is wrong gets its own error; the others go on. What the output file answers already is not asked again; its errors are.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import aiohttp
import msgspec

from xllm_core.errors import ConfigError, EngineDeadError, InvalidRequestError
from xllm_core.frontend.validation import shown
from xllm_core.server.body import parse_object

ROUTES = ("/v1/chat/completions", "/v1/completions")
_RETRIED = (429, 503)
_MAX_TRIES = 6
_MAX_PAUSE_S = 60.0
_MAX_BUSY_S = 3600.0  # how long a server may say that it is busy before a line is given up


@dataclass(frozen=True, slots=True)
class Reply:
    """One response. retry_after_s: when the server asks to come again."""

    status: int
    body: Any
    request_id: str = ""
    retry_after_s: float = 1.0


class Target(Protocol):
    """Who answers."""

    async def post(self, path: str, body: bytes) -> Reply:
        """One request. Raises OSError or aiohttp.ClientError where there was no response."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input. problem: why it cannot be asked; then the rest means nothing."""

    number: int
    custom_id: str
    path: str = ""
    body: bytes = b""
    problem: str | None = None


@dataclass(slots=True)
class Tally:
    """Lines of this run, and those of them that have an error instead of an answer."""

    num_done: int = 0
    num_failed: int = 0
    errors: list[str] = field(default_factory=list)


class LocalTarget:
    """An application of this process, called without a socket."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def post(self, path: str, body: bytes) -> Reply:
        """Call the route as the server would."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        never = asyncio.Event()
        status, headers, pieces = 0, {}, bytearray()

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await never.wait()

        async def send(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message["headers"])
            pieces.extend(message.get("body", b""))

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None, "server": ("localhost", None),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
            "state": {},
        }  # fmt: skip
        await self._app(scope, receive, send)
        answer = msgspec.json.decode(bytes(pieces))
        if status == 503 and answer["error"]["code"] == "engine_unavailable":
            raise EngineDeadError(
                answer["error"]["message"]
            )  # it is not coming back, unlike a server's that a supervisor starts again
        pause_s = float(headers.get(b"retry-after", b"1"))
        return Reply(status, answer, headers.get(b"x-request-id", b"").decode(), pause_s)


class RemoteTarget:
    """A server at a URL (`http://HOST:PORT`, with or without /v1)."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/").removesuffix("/v1")

    async def post(self, path: str, body: bytes) -> Reply:
        """One request over HTTP."""
        async with self._session.post(
            self._url + path, data=body, headers={"Content-Type": "application/json"}
        ) as response:
            raw = await response.read()
            pause = response.headers.get("Retry-After", "")
            try:
                answer: Any = msgspec.json.decode(raw)
            except msgspec.DecodeError:
                answer = {"error": {"message": raw[:500].decode(errors="replace"), "code": None}}
            pause_s = float(pause) if pause.replace(".", "", 1).isdigit() else 1.0
            return Reply(response.status, answer, response.headers.get("X-Request-Id", ""), pause_s)


@asynccontextmanager
async def remote_target(url: str, api_key: str | None) -> AsyncIterator[RemoteTarget]:
    """A target with a connection pool that lasts as long as the block."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
    async with aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        yield RemoteTarget(session, url)


def read_lines(path: Path) -> list[Line]:
    """Every line of a batch file that is not empty. Raises ConfigError if the file cannot be read."""
    try:
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    lines, seen = [], set()
    for number, text in enumerate(raw, start=1):
        if not text.strip():
            continue
        line = _read_line(number, text)
        if line.problem is None and line.custom_id in seen:
            line = Line(
                number, line.custom_id, problem=f"custom_id {shown(line.custom_id)} stands on an earlier line already"
            )
        seen.add(line.custom_id)
        lines.append(line)
    return lines


def _read_line(number: int, text: bytes) -> Line:
    name = f"line-{number}"
    try:
        entry = parse_object(text)
        given = entry.get("custom_id")
        if not isinstance(given, str) or not given:
            raise InvalidRequestError(f"custom_id = {shown(given)}: it must be a text, and not empty")
        name = given
        if entry.get("method", "POST") != "POST":
            raise InvalidRequestError(f"method = {shown(entry['method'])}: only POST is known")
        if entry.get("url") not in ROUTES:
            raise InvalidRequestError(f"url = {shown(entry.get('url'))}: it must be {' or '.join(ROUTES)}")
        if not isinstance(entry.get("body"), dict):
            raise InvalidRequestError(f"body = {shown(entry.get('body'))}: it must be an object")
        if entry["body"].get("stream"):
            raise InvalidRequestError("stream: true has no meaning in a batch; leave it out")
    except InvalidRequestError as error:
        return Line(number, name, problem=str(error))
    return Line(number, name, entry["url"], json.dumps(entry["body"]).encode())


def open_output(path: Path, *, is_fresh: bool) -> tuple[IO[bytes], set[str]]:
    """The output, ready to be appended to, and the custom_ids that it answers. Errors, and a line that a kill has torn, are taken out.

    is_fresh: begin anew, whatever is there. Raises ConfigError for a file that is no result of a batch.
    """
    done: dict[str, bytes] = {}
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file; results go to one, so that they can be resumed")
    if path.exists() and not is_fresh:
        lines = path.read_bytes().splitlines(keepends=True)
        for number, text in enumerate(lines, start=1):
            try:
                entry = json.loads(text)
                is_answer, custom_id = entry["error"] is None, entry["custom_id"]
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines) or text.endswith(b"\n"):
                    raise ConfigError(
                        f"{path} line {number} is no result of a batch; name another file with -o, or begin anew with --fresh"
                    ) from error
                break
            if is_answer and text.endswith(b"\n"):
                done[custom_id] = text
    try:
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        fresh.write_bytes(b"".join(done.values()))
        fresh.replace(path)
        return path.open("ab"), set(done)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


async def run_batch(
    lines: Iterable[Line], target: Target, out: IO[bytes], *, max_concurrent: int, on_line: Callable[[bool], None]
) -> Tally:
    """Ask every line and write its result as soon as it is there. on_line: called with whether it was answered well.

    Raises EngineDeadError where the target is gone for good; what was answered is written.
    """
    tally, waiting = Tally(), iter(lines)

    async def work() -> None:
        for line in waiting:
            result = await _ask(line, target)
            is_good = result["error"] is None
            tally.num_done += 1
            if not is_good:
                tally.num_failed += 1
                tally.errors.append(f"{line.custom_id} (line {line.number}): {result['error']['message']}")
            out.write(msgspec.json.encode(result) + b"\n")
            out.flush()
            on_line(is_good)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max_concurrent):
                group.create_task(work())
    except* EngineDeadError as died:
        raise died.exceptions[0] from None
    return tally


async def _ask(line: Line, target: Target) -> dict[str, Any]:
    """The result of one line, as OpenAI writes it."""
    result: dict[str, Any] = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.custom_id,
        "response": None,
        "error": None,
    }
    if line.problem is not None:
        result["error"] = {"code": "invalid_line", "message": line.problem}
        return result
    failure, num_tries, busy_until_s = "", 0, time.monotonic() + _MAX_BUSY_S
    while num_tries < _MAX_TRIES:
        pause_s = min(_MAX_PAUSE_S, 2.0**num_tries)
        num_tries += 1
        try:
            reply = await target.post(line.path, line.body)
        except (OSError, aiohttp.ClientError) as error:
            failure = f"no answer: {type(error).__name__}: {error}"
        else:
            result["response"] = {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body}
            if reply.status not in _RETRIED:
                if reply.status >= 400:
                    told = reply.body.get("error", {}) if isinstance(reply.body, dict) else {}
                    result["error"] = {"code": told.get("code"), "message": told.get("message", "")}
                return result
            failure = f"the server answered {reply.status} again and again"
            if reply.status == 429 and time.monotonic() < busy_until_s:
                num_tries -= 1  # it works on others, maybe of ours
            pause_s = max(pause_s, min(_MAX_PAUSE_S, reply.retry_after_s))
        if num_tries < _MAX_TRIES:
            await asyncio.sleep(pause_s)
    result["error"] = {"code": "no_answer", "message": failure}
    return result
