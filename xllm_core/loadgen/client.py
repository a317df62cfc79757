"""One streamed request to a server that speaks OpenAI's API: send, time the chunks, name what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import aiohttp
import msgspec

from xllm_core.loadgen.samples import ErrorKind, Sample
from xllm_core.loadgen.workload import Ask, Prompts

PromptMode = Literal["ids", "text"]
Endpoint = Literal["completions", "chat"]
_MAX_MESSAGE_CHARS = 300


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """Only what is measured: decoding passes over the rest without making objects of it."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked. extra: fields put into every body, over our own; None takes one out."""

    url: str
    model: str
    endpoint: Endpoint = "completions"
    prompt_mode: PromptMode = "ids"
    uds: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0

    def base(self) -> str:
        """The URL without a final slash or /v1, which people give or leave out."""
        return self.url.rstrip("/").removesuffix("/v1")

    def body(self, ask: Ask, prompts: Prompts, output_tokens: int | None = None) -> bytes:
        """The request as JSON."""
        prompt = prompts.ids(ask) if self.prompt_mode == "ids" else prompts.text(ask)
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_tokens or ask.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "chat":
            asked["messages"] = [{"role": "user", "content": prompt}]
        else:
            asked["prompt"] = prompt
        return msgspec.json.encode({key: value for key, value in {**asked, **self.extra}.items() if value is not None})


class Failure(Exception):
    """A request that did not come to its proper end."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind


class LoadClient:
    """Connections to one server. `async with`; any number of requests at once."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._path = "/v1/chat/completions" if target.endpoint == "chat" else "/v1/completions"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> LoadClient:
        target = self.target
        trace = aiohttp.TraceConfig()
        trace.on_request_chunk_sent.append(_note_written)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(target.uds, limit=0) if target.uds else aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=None, sock_connect=target.timeout_s, sock_read=target.timeout_s
            ),
            headers=dict(target.headers),
            trace_configs=[trace],
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def facts(self) -> dict[str, Any]:
        """What the server says of itself at /version and /v1/models; None for what it does not answer. Raises Failure."""
        return {path.rpartition("/")[2]: await self._get(path) for path in ("/version", "/v1/models")}

    async def send(self, sample: Sample, body: bytes, start_s: float) -> None:
        """Fill in `sample` while the answer comes. Raises nothing: what goes wrong stands in the sample. start_s: when the run began."""
        written = SimpleNamespace(at_s=None)
        try:
            async with self._post(body, written) as response:
                sample.status = response.status
                begun_s = written.at_s or time.perf_counter()
                sample.sent_s = begun_s - start_s
                if response.status != 200:
                    raise Failure("http", _reason(await response.text(errors="replace")))
                if response.content_type != "text/event-stream":
                    raise Failure("protocol", f"the answer is {response.content_type}, not text/event-stream")
                await _read(response, sample, begun_s)
            sample.outcome = "ok"
        except Failure as error:
            _fail(sample, error.kind, str(error))
        except TimeoutError as error:
            _fail(sample, "timeout", str(error) or f"silence of {self.target.timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            _fail(sample, "connect", str(error))
        except (aiohttp.ClientError, OSError) as error:
            _fail(sample, "disconnect", f"{type(error).__name__}: {error}")
        if written.at_s is not None:
            sample.sent_s = written.at_s - start_s
            sample.end_s = time.perf_counter() - written.at_s

    def _post(self, body: bytes, written: SimpleNamespace) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._open().post(
            f"{self.target.base()}{self._path}", data=body, headers={"Content-Type": "application/json"},
            allow_redirects=False, trace_request_ctx=written,
        )  # fmt: skip

    async def _get(self, path: str) -> Any:
        try:
            async with self._open().get(f"{self.target.base()}{path}") as response:
                if response.status == 401:
                    raise Failure("http", f"{path} answers 401: {_reason(await response.text(errors='replace'))}")
                return msgspec.json.decode(await response.read()) if response.status == 200 else None
        except msgspec.DecodeError:
            return None
        except TimeoutError as error:
            raise Failure("timeout", f"{path} does not answer within {self.target.timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failure("connect", str(error)) from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use LoadClient in an `async with`")
        return self._session


class EventParser:
    """Cuts bytes of an event stream into the data of its events. Comments and other fields are passed over."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Data of the events, one line each, that are whole with these bytes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _read(response: aiohttp.ClientResponse, sample: Sample, begun_s: float) -> None:
    """Read the stream to its [DONE]. Raises Failure."""
    parser = EventParser()
    is_done = False
    async for data in response.content.iter_any():
        now_s = time.perf_counter() - begun_s
        for event in parser.feed(data):
            if event == b"[DONE]":
                is_done = True
                continue
            try:
                chunk = _decode_chunk(event)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Failure("protocol", f"{error}: {event[:_MAX_MESSAGE_CHARS]!r}") from error
            if chunk.error is not None:
                raise Failure("stream", _reason(event.decode(errors="replace")))
            _take_in(chunk, sample, now_s)
    if not is_done:
        raise Failure("disconnect", "the stream ended without [DONE]")


def _take_in(chunk: _Chunk, sample: Sample, now_s: float) -> None:
    for choice in chunk.choices:
        delta = choice.delta
        if choice.text or choice.token_ids or (delta is not None and (delta.content or delta.reasoning_content)):
            sample.chunk_s.append(now_s)
        if choice.finish_reason is not None:
            sample.finish_reason = choice.finish_reason
    if (usage := chunk.usage) is not None:
        sample.prompt_tokens, sample.output_tokens = usage.prompt_tokens, usage.completion_tokens
        details = usage.prompt_tokens_details
        sample.cached_tokens = details.cached_tokens if details is not None else None


async def _note_written(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestChunkSentParams
) -> None:
    context.trace_request_ctx.at_s = time.perf_counter()


def _reason(text: str) -> str:
    """The message of an error body in OpenAI's shape, or its beginning."""
    try:
        error = msgspec.json.decode(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (msgspec.DecodeError, KeyError, TypeError):
        pass
    return str(text)[:_MAX_MESSAGE_CHARS]


def _fail(sample: Sample, kind: ErrorKind, message: str) -> None:
    sample.outcome, sample.error, sample.message = "failed", kind, message[:_MAX_MESSAGE_CHARS]
