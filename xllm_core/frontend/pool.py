"""Several engines behind one face: each request goes to the engine with the least to do and stays there."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_core.engine.info import EngineInfo
from xllm_core.frontend.remote import EngineProcess
from xllm_core.types import EngineRequest, TokenOutput


class EnginePool:
    """An `EngineClient` over engines that serve the same model with the same settings."""

    def __init__(self, engines: Sequence[EngineProcess]) -> None:
        self.engines = tuple(engines)

    def info(self) -> EngineInfo:
        """What each of them serves; all are built from one set of settings."""
        return self.engines[0].info()

    def check(self, request: EngineRequest) -> None:
        """Raise the RequestError of a request that could never be served here."""
        self.engines[0].check(request)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request where least is unfinished."""
        min(self.engines, key=lambda engine: engine.num_unfinished).submit(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request or one of its sequences, wherever it is."""
        for engine in self.engines:
            if engine.holds(request_id):
                engine.abort(request_id, index)

    def poll(self) -> list[TokenOutput]:
        """What came since the last call, from all of them."""
        return [output for engine in self.engines for output in engine.poll()]

    @property
    def has_work(self) -> bool:
        """Whether anything submitted is unfinished."""
        return any(engine.has_work for engine in self.engines)

    def close(self) -> None:
        """Stop all of them."""
        for engine in self.engines:
            engine.close()
