"""Every error the project raises on purpose.

XllmError
├── ConfigError              a setting is wrong; says where it was written and what is allowed
├── PluginError              a plugin could not be found, loaded or used
│   ├── PluginConflictError      two claims on one name
│   └── ResolutionError          nothing installed fits what was asked for; carries every rejection
├── ModelError               a model cannot be served
│   ├── ModelNotFoundError       the reference names nothing we can open
│   ├── ModelFormatError         a file is damaged, truncated or of an unknown kind
│   └── WeightMismatchError      tensors missing, misshapen, or not expected
├── RequestError             one request is refused; its neighbours never notice
│   ├── InvalidRequestError      a field has a value it may not have
│   ├── PromptTooLongError       the prompt exceeds the context
│   ├── RequestTooLargeError     the request can never fit the KV pool, however long it waits
│   ├── QueueFullError           try again later
│   └── HttpRefusal              refused by the HTTP server itself: key, host, path, size, time
├── EngineDeadError          the engine stopped; nothing more will come from it
└── IntegrityError           an invariant of ours broke: a bug, please report it

A message says what happened, with the numbers, and what to do next. `http_status` and `is_retryable` are read by the server.
"""

from __future__ import annotations


class XllmError(Exception):
    """Root of the tree; never raised itself."""

    http_status = 500
    is_retryable = False


class ConfigError(XllmError):
    """A setting is wrong."""

    http_status = 400


class PluginError(XllmError):
    """A plugin could not be found, loaded or used."""


class PluginConflictError(PluginError):
    """Two plugins claim one name; the message prints the TOML line that decides."""


class ResolutionError(PluginError):
    """Nothing installed fits what was asked for.

    rejections: (qualified name, reason) of every candidate looked at, in rank order.
    """

    def __init__(self, message: str, rejections: tuple[tuple[str, str], ...] = ()) -> None:
        lines = [message, *(f"  rejected {name}: {reason}" for name, reason in rejections)]
        super().__init__("\n".join(lines))
        self.rejections = rejections


class ModelError(XllmError):
    """A model cannot be served."""

    http_status = 400


class ModelNotFoundError(ModelError):
    """The reference names nothing we can open."""

    http_status = 404


class ModelFormatError(ModelError):
    """A file is damaged, truncated or of an unknown kind."""


class WeightMismatchError(ModelError):
    """Tensors are missing, misshapen, or present without being expected."""


class RequestError(XllmError):
    """One request is refused."""

    http_status = 400


class InvalidRequestError(RequestError):
    """A field has a value it may not have.

    param: the field's name as the user wrote it, None when no single field is to blame.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """The prompt exceeds the model's context."""

    param = "prompt"

    def __init__(self, request_id: str, *, prompt_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"request {request_id!r}: the prompt has {prompt_tokens} tokens, the context holds {max_model_len} and one "
            f"must stay free for the answer; shorten the prompt to at most {max_model_len - 1} tokens"
            " or raise [model] max_model_len if the model allows it"
        )
        self.prompt_tokens = prompt_tokens
        self.max_model_len = max_model_len


class RequestTooLargeError(RequestError):
    """The request can never fit this pool, however long it waits."""

    def __init__(self, request_id: str, *, prompt_tokens: int, max_tokens: int, capacity_tokens: int) -> None:
        room = capacity_tokens - prompt_tokens + 1  # the last sampled token is returned, never cached
        fix = f"lower max_tokens to {room}" if room > 0 else f"shorten the prompt to at most {capacity_tokens} tokens"
        super().__init__(
            f"request {request_id!r}: prompt {prompt_tokens} + max_tokens {max_tokens} exceeds the KV pool of "
            f"{capacity_tokens} tokens; {fix}, or raise [kv] memory_bytes and start again"
        )
        self.capacity_tokens = capacity_tokens


class QueueFullError(RequestError):
    """Too many requests wait already."""

    http_status = 429
    is_retryable = True


class HttpRefusal(RequestError):
    """Refused by the HTTP server itself, before anything reads the request. code: for programs. should_close: end the connection."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        should_close: bool = False,
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.is_retryable = status in (429, 503)
        self.code = code
        self.param = param
        self.should_close = should_close


class EngineDeadError(XllmError):
    """The engine stopped; nothing more will come from it."""

    http_status = 503
    is_retryable = True


class IntegrityError(XllmError):
    """An invariant of ours broke: a bug, please report it."""
