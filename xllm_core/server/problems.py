"""Errors as OpenAI's clients expect them, on every path: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

import msgspec

from xllm_core.errors import EngineDeadError, PromptTooLongError, QueueFullError, RequestTooLargeError, XllmError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
}


class Problem(msgspec.Struct):
    """A refusal, ready to be sent. headers: further ones of the response."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON object of the response, or of an error chunk of a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "internal_server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def describe(error: BaseException, *, retry_after_s: int = 1) -> Problem:
    """What a client is told. Of an error that is not ours it learns nothing but that it happened: no path, no type, no address."""
    if not isinstance(error, XllmError):
        text = "internal error; the server's log has the details under this request's id"
        return Problem(500, text, code="internal_error", headers={"x-should-retry": "false"})
    status = error.http_status
    headers: dict[str, str] = {}
    if error.is_retryable:
        headers["Retry-After"] = str(retry_after_s)
    elif status >= 500:
        headers["x-should-retry"] = "false"
    if getattr(error, "should_close", False):
        headers["Connection"] = "close"
    return Problem(status, str(error), getattr(error, "param", None), _code(error), headers)


def _code(error: XllmError) -> str | None:
    if isinstance(error, PromptTooLongError | RequestTooLargeError):
        return "context_length_exceeded"
    if isinstance(error, QueueFullError):
        return "queue_full"
    if isinstance(error, EngineDeadError):
        return "engine_unavailable"
    code: str | None = getattr(error, "code", None)
    return code
