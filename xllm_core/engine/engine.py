"""One engine, one loop, tokens in and out. No text, no HTTP, no plugin look-ups."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_core.engine.executor import Executor, StepFuture, StepHandle
from xllm_core.engine.metrics import StepLog
from xllm_core.engine.predictor import StepShape
from xllm_core.engine.scheduler import Scheduler
from xllm_core.errors import EngineDeadError, InvalidRequestError
from xllm_core.plugins.contracts.observer import StepRecord
from xllm_core.types import EngineRequest, StepPlan, TokenOutput

_STORE_POLL_S = 0.001


@dataclass(slots=True)
class _Running:
    plan: StepPlan
    handle: StepHandle
    future: StepFuture
    started_s: float
    schedule_s: float
    num_preempted: int


class Engine:
    """Owns the scheduler and the executor. Not thread-safe: one thread submits, steps and aborts.

    depth: plans in flight. With 1 a step is whole before the next is scheduled; with 2 the next is scheduled while it runs. Not more: a row
    can point at the step before (`prev_rows`), and what was sampled earlier than that must be known.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        vocab_size: int,
        step_log: StepLog | None = None,
        depth: int = 1,
    ) -> None:
        if depth not in (1, 2):
            raise ValueError(f"an engine has 1 or 2 plans in flight, not {depth}")
        self.scheduler = scheduler
        self.executor = executor
        self.vocab_size = vocab_size
        self.step_log = step_log or StepLog()
        self.depth = depth
        self._running: deque[_Running] = deque()
        self._failure: BaseException | None = None
        self.num_replays = 0

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; raises RequestError and leaves everything as it was when it cannot be served."""
        self._check_alive()
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequestError(
                f"request {request.request_id!r}: the prompt is empty; give at least one token", param="prompt"
            )
        self._check_ids(request.request_id, "prompt", prompt)
        for tokens in request.emitted:
            self._check_ids(request.request_id, "emitted", tokens)
        if request.emitted and len(request.emitted) != request.params.n:
            raise InvalidRequestError(
                f"request {request.request_id!r}: emitted tokens of {len(request.emitted)} sequences for n = {request.params.n}; give one list each",
                param="emitted",
            )
        self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> int:
        """Drop a request or one of its sequences at once; returns how many sequences were dropped. Nothing more comes out for them."""
        return self.scheduler.abort(request_id, index)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work

    @property
    def num_in_flight(self) -> int:
        """Plans handed over whose results are not in."""
        return len(self._running)

    def step(self) -> list[TokenOutput]:
        """Schedule, execute, sample, update, emit: one pass. Returns the new tokens of every sequence that got some.

        Whatever is raised in here (an interrupt too) leaves a step half done, and ends the engine: EngineDeadError from then on.
        """
        self._check_alive()
        try:
            return self._step()
        except BaseException as error:
            self._failure = error
            raise

    def _step(self) -> list[TokenOutput]:
        while not self._running or (len(self._running) < self.depth and self.scheduler.can_schedule):
            self._launch()
        step = self._running.popleft()
        result = step.future.result()
        sampled_s = time.perf_counter()
        outputs = self.scheduler.update(result)
        self._record(step, time.perf_counter() - sampled_s)
        is_stuck = step.plan.is_empty and all(other.plan.is_empty for other in self._running)
        if is_stuck and self.scheduler.has_unfinished:
            time.sleep(_STORE_POLL_S)  # only a store can go on: it has an answer to give, or blocks to give back
        return outputs

    def _check_alive(self) -> None:
        if self._failure is not None:
            cause = f"{type(self._failure).__name__}: {self._failure}".rstrip(": ")
            raise EngineDeadError(f"a step of this engine failed ({cause}); start a new one") from self._failure

    def close(self) -> None:
        """Stop the worker and the observers; waits for the call that runs, if one does. What is unfinished stays unfinished."""
        self._running.clear()
        try:
            self.executor.close()
        finally:
            self.step_log.close()

    def _launch(self) -> None:
        started_s = time.perf_counter()
        num_preempted = self.scheduler.stats.num_preemptions
        plan = self.scheduler.schedule()
        schedule_s = time.perf_counter() - started_s
        handle = self.executor.execute(plan)
        num_preempted = self.scheduler.stats.num_preemptions - num_preempted
        self._running.append(_Running(plan, handle, self.executor.sample(handle), started_s, schedule_s, num_preempted))

    def _record(self, step: _Running, emit_s: float) -> None:
        scheduler, times = self.scheduler, step.handle.times
        used, total = scheduler.kv.usage()
        self.num_replays += times.is_replayed
        plan = step.plan
        shape = StepShape.of(plan.starts, plan.lengths, plan.num_tokens)
        record = StepRecord(
            step=plan.step,
            started_s=step.started_s,
            schedule_s=step.schedule_s,
            prepare_s=times.prepare_s,
            forward_s=times.forward_s,
            sample_s=times.sample_s,
            emit_s=emit_s,
            forward_ended_s=times.forward_ended_s,
            num_rows=shape.num_rows,
            num_tokens=plan.num_tokens,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.parked),
            num_preempted=step.num_preempted,
            used_blocks=used,
            total_blocks=total,
            is_replayed=times.is_replayed,
            kv_tokens=shape.kv_tokens,
            attended=shape.attended,
        )
        self.step_log.add(record)
        if scheduler.step_times is not None:
            scheduler.step_times.add(record)

    def _check_ids(self, request_id: str, what: str, token_ids: Sequence[int]) -> None:
        low, high = (min(token_ids), max(token_ids)) if token_ids else (0, 0)
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise InvalidRequestError(
                f"request {request_id!r}: token id {bad} in {what} is outside the vocabulary 0..{self.vocab_size - 1}",
                param=what,
            )
