"""Drives an engine over requests to their end, step by step, for tests that look at every plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm_core.engine.engine import Engine
from xllm_core.engine.executor import Executor, StepFuture, StepHandle
from xllm_core.types import EngineRequest, StepPlan, TokenOutput

Key = tuple[str, int]
Tokens = dict[Key, list[int]]


def drive(
    engine: Engine,
    requests: Sequence[EngineRequest],
    *,
    on_plan: Callable[[StepPlan], None] | None = None,
    into: list[TokenOutput] | None = None,
) -> Tokens:
    """Run requests to their end; returns tokens by (request id, sequence index). on_plan is called before each step runs."""
    got: Tokens = {}
    executor = engine.executor
    if on_plan is not None:
        engine.executor = _Watched(executor, on_plan)
    try:
        for request in requests:
            engine.submit(request)
            got |= {(request.request_id, i): [] for i in range(request.params.n)}
        while engine.scheduler.live_sequences():
            for output in engine.step():
                got[output.request_id, output.index].extend(output.new_token_ids)
                if into is not None:
                    into.append(output)
    finally:
        engine.executor = executor
    return got


@dataclass(slots=True)
class _Watched:
    """An executor that shows each plan before it runs."""

    executor: Executor
    on_plan: Callable[[StepPlan], None]

    def execute(self, plan: StepPlan) -> StepHandle:
        self.on_plan(plan)
        return self.executor.execute(plan)

    def sample(self, handle: StepHandle) -> StepFuture:
        return self.executor.sample(handle)

    def close(self) -> None:
        self.executor.close()


def settle(engine: Engine) -> None:
    """Step until no KV transfer is under way, so that what was to be saved is saved."""
    while engine.has_work or engine.scheduler.kv.stats().held_blocks:
        engine.step()
        time.sleep(0.001)
