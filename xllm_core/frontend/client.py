"""The one face of an engine that everything on the text side knows: local or remote, one or many. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from xllm_core.engine.engine import Engine
from xllm_core.types import EngineRequest, TokenOutput


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of a running engine. capacity_tokens: the longest sequence its KV pool holds. kernels: what was chosen, by name of its use.

    is_row_invariant: the device promises that a row's result does not depend on the other rows, to the bit.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    capacity_tokens: int
    num_blocks: int
    block_size: int
    kernels: Mapping[str, str] = field(default_factory=dict)
    plan_hash: str = ""
    is_row_invariant: bool = False


class EngineClient(Protocol):
    """Submit, abort, and take what comes out."""

    def info(self) -> EngineInfo:
        """What is being served, and how."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; raises RequestError when it is refused."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request or one of its sequences; an id that is not there any more is fine."""

    def poll(self) -> list[TokenOutput]:
        """What came out since the last call; waits for something while there is work, returns nothing when there is none."""

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

    def info(self) -> EngineInfo:
        """What is being served, and how."""
        return self._info

    def submit(self, request: EngineRequest) -> None:
        """Queue a request."""
        self.engine.submit(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request or one of its sequences."""
        self.engine.abort(request_id, index)

    def poll(self) -> list[TokenOutput]:
        """Step until something comes out."""
        while self.engine.has_work:
            outputs = self.engine.step()
            if outputs:
                return outputs
        return []

    @property
    def has_work(self) -> bool:
        """Whether anything submitted is unfinished."""
        return self.engine.has_work

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()
