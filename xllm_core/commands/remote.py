"""Asking a running server from the terminal."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import aiohttp
import click

from xllm_core.errors import EngineDeadError, InvalidRequestError, XllmError
from xllm_core.types import SamplingParams

KEY_VARIABLE = "XLLM_API_KEY"


@dataclass(slots=True)
class RemoteAnswer:
    """What a server streamed. ttft_s: from sending to the first text."""

    text: str = ""
    usage: Mapping[str, Any] | None = None
    ttft_s: float = 0.0
    elapsed_s: float = 0.0

    def summary(self, url: str) -> str:
        """One line of figures, as `xllm chat` prints it for a model of its own."""
        usage = self.usage or {}
        new = usage.get("completion_tokens", 0)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        left_s = self.elapsed_s - self.ttft_s
        speed = f"{(new - 1) / left_s:.1f} tok/s" if new > 1 and left_s > 0 else "- tok/s"
        return (
            f"[{usage.get('prompt_tokens', 0)} prompt tokens ({cached} cached), {new} new, first after {self.ttft_s * 1e3:.0f} ms, "
            f"then {speed} | {url}]"
        )


def stream_chat(
    url: str, model: str | None, messages: Sequence[Mapping[str, str]], params: Mapping[str, Any]
) -> RemoteAnswer:
    """Ask, and write the text to stdout as it comes. params: fields of the request. Raises XllmError with the server's own message.

    An interrupt closes the connection, upon which the server frees the request.
    """
    body = {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **params}
    if model is not None:
        body["model"] = model
    try:
        return asyncio.run(_stream(f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions", body))
    except aiohttp.ClientError as error:
        raise EngineDeadError(f"{url} does not answer: {error}; is the server running?") from error
    finally:
        sys.stdout.write("\n")


async def _stream(url: str, body: Mapping[str, Any]) -> RemoteAnswer:
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer, started_s = RemoteAnswer(), time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
        session.post(url, json=body) as response,
    ):
        if response.status != 200:
            raise _refusal(response.status, await response.text())
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise EngineDeadError(chunk["error"]["message"])
            answer.usage = chunk.get("usage") or answer.usage
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    answer.ttft_s = answer.ttft_s or time.perf_counter() - started_s
                    answer.text += text
                    sys.stdout.write(text)
                    sys.stdout.flush()
    answer.elapsed_s = time.perf_counter() - started_s
    return answer


def _refusal(status: int, text: str) -> XllmError:
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        message = text[:300] or "no message"
    hint = f"; set {KEY_VARIABLE}" if status == 401 else ""
    return InvalidRequestError(f"the server answered {status}: {message}{hint}")


def given_params(flags: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling flags that were given out of `flags`, as fields of a request."""
    names = {field.name for field in fields(SamplingParams)} & set(flags)
    given = {name: flags.pop(name) for name in names}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v not in (None, ())}


def refuse_settings(flags: Mapping[str, Any]) -> None:
    """Settings have no meaning beside --url, and are not passed over in silence."""
    if meant := [name for name, value in flags.items() if value not in (None, ())]:
        raise click.UsageError(
            f"--{meant[0].replace('_', '-')} is a setting of the server; it has no meaning beside --url"
        )
