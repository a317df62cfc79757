"""The one face of an engine that everything on the text side knows: local or remote, one or many. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from xllm_core.engine.info import EngineInfo
from xllm_core.errors import EngineDeadError
from xllm_core.types import EngineRequest, TokenOutput

if TYPE_CHECKING:
    from xllm_core.engine.engine import Engine  # an API process has no use for one


class EngineClient(Protocol):
    """Submit, abort, and take what comes out."""

    def info(self) -> EngineInfo:
        """What is being served, and how."""

    def check(self, request: EngineRequest) -> None:
        """Raise the RequestError of a request that could never be served here, however empty the queue."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; raises RequestError when it is refused, EngineDeadError after `close`."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request or one of its sequences; an id that is not there any more is fine."""

    def poll(self) -> list[TokenOutput]:
        """What came out since the last call. Waits for one step at most, and that step may have brought nothing: ask again while
        `has_work`. Raises EngineDeadError after `close`.
        """

    @property
    def has_work(self) -> bool:
        """Whether anything submitted is unfinished."""

    def close(self) -> None:
        """Stop the engine."""


class InProcessClient:
    """An engine in the caller's process and thread: `poll` is what makes it run."""

    def __init__(self, engine: Engine, info: EngineInfo) -> None:
        self.engine = engine
        self._info = info
        self._is_closed = False

    def info(self) -> EngineInfo:
        """What is being served, and how."""
        return self._info

    def check(self, request: EngineRequest) -> None:
        """Raise what `submit` would raise with an empty queue for the request's lengths."""
        self._require_open()
        self.engine.scheduler.admission.check(request)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request."""
        self._require_open()
        self.engine.submit(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request or one of its sequences."""
        if not self._is_closed:
            self.engine.abort(request_id, index)

    def poll(self) -> list[TokenOutput]:
        """Make one step, so that between the chunks of a long prompt there is time for other requests and for aborts."""
        self._require_open()
        return self.engine.step() if self.engine.has_work else []

    @property
    def has_work(self) -> bool:
        """Whether anything submitted is unfinished."""
        return not self._is_closed and self.engine.has_work

    def close(self) -> None:
        """Stop the engine. Safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            self.engine.close()

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineDeadError("the engine was closed; start a new one")
