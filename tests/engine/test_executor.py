"""The worker's thread: order, waiting, failures, and how it ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from xllm_core.engine.executor import ThreadExecutor
from xllm_core.errors import EngineDeadError
from xllm_core.types import StepPlan, StepResult, StepTimes

LONG_S = 30.0


@dataclass
class Handle:
    plan: StepPlan
    times: StepTimes


@dataclass
class GatedWorker:
    """Every forward waits for the gate. calls: what was done, and by which thread."""

    gate: threading.Event = field(default_factory=threading.Event)
    calls: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    has_begun: threading.Event = field(default_factory=threading.Event)
    errors: dict[str, BaseException] = field(default_factory=dict)

    def _do(self, what: str) -> None:
        self.calls.append(what)
        self.threads.add(threading.get_ident())
        if what in self.errors:
            raise self.errors[what]

    def execute(self, plan: StepPlan) -> Handle:
        self.has_begun.set()
        assert self.gate.wait(LONG_S)
        self._do(f"execute {plan.step}")
        return Handle(plan, StepTimes(forward_s=1.0 + plan.step))

    def sample(self, handle: Any) -> StepResult:
        self._do(f"sample {handle.plan.step}")
        return StepResult([(handle.plan.step,)])

    def close(self) -> None:
        self._do("close")


def hand_over(executor: ThreadExecutor, step: int) -> Any:
    return executor.sample(executor.execute(StepPlan(step)))


def test_calls_return_at_once_and_run_in_order() -> None:
    """Red if a call waits for the worker, if two plans change places, or if the worker is called by two threads."""
    worker = GatedWorker()
    executor = ThreadExecutor(worker)
    handles = [executor.execute(StepPlan(0))]
    futures = [executor.sample(handles[0]), hand_over(executor, 1)]
    assert worker.calls == [], "the gate is closed: nothing can have run"
    worker.gate.set()
    assert futures[1].result().token_ids == [(1,)]
    assert futures[0].result().token_ids == [(0,)]
    assert futures[0].result().token_ids == [(0,)], "a result can be asked for again"
    assert handles[0].times.forward_s == 1.0
    executor.close()
    assert worker.calls == ["execute 0", "sample 0", "execute 1", "sample 1", "close"]
    assert len(worker.threads) == 1
    assert threading.get_ident() not in worker.threads


class LaunchingWorker(GatedWorker):
    """Step 1 is laid out only when `may_launch` is set, and computes until `may_end` is. tells: it says when it is launched."""

    def __init__(self, *, tells: bool = True) -> None:
        super().__init__()
        self.gate.set()
        self.tells = tells
        self.on_launch: Callable[[], None] = lambda: None
        self.may_launch, self.may_end, self.is_laid_out = threading.Event(), threading.Event(), threading.Event()

    def execute(self, plan: StepPlan) -> Handle:
        if plan.step == 1:
            self.is_laid_out.set()
            assert self.may_launch.wait(LONG_S)
            self._do("launch 1")
            if self.tells:
                self.on_launch()
            assert self.may_end.wait(LONG_S)
        return super().execute(plan)


class Waiting(threading.Thread):
    """Somebody who waits for tokens."""

    def __init__(self, future: Any) -> None:
        super().__init__(daemon=True)
        self._future = future
        self.start()

    def run(self) -> None:
        self._future.result()


def two_steps(worker: LaunchingWorker) -> tuple[ThreadExecutor, Waiting, Any]:
    """Step 0 is over and step 1, which waited behind it, is being laid out."""
    worker.gate.clear()
    executor = ThreadExecutor(worker)
    first, second = hand_over(executor, 0), hand_over(executor, 1)
    waiting = Waiting(first)
    worker.gate.set()
    assert worker.is_laid_out.wait(LONG_S)
    return executor, waiting, second


def test_tokens_are_told_when_the_next_step_is_launched() -> None:
    """Whoever waits for them does not take the interpreter from a worker that lays the next step out, and does not wait for its end.

    Red if they are told before, or after the forward.
    """
    worker = LaunchingWorker()
    executor, waiting, second = two_steps(worker)
    waiting.join(0.05)
    assert waiting.is_alive(), "told while step 1 was laid out"
    worker.may_launch.set()
    waiting.join(LONG_S)
    assert not waiting.is_alive() and "execute 1" not in worker.calls
    worker.may_end.set()
    assert second.result().token_ids == [(1,)]
    assert hand_over(executor, 2).result().token_ids == [(2,)], "nothing waits behind it: told at once"
    executor.close()


def test_tokens_are_told_though_the_next_step_fails_or_never_tells() -> None:
    """What was sampled was sampled. Red if tokens that are owed are forgotten, or take the error of the step behind them."""
    failing = LaunchingWorker()
    failing.errors["launch 1"] = RuntimeError("no room")
    executor, waiting, second = two_steps(failing)
    failing.may_launch.set()
    waiting.join(LONG_S)
    assert not waiting.is_alive() and failing.calls[:2] == ["execute 0", "sample 0"]
    with pytest.raises(RuntimeError, match="no room"):
        second.result()
    executor.close()

    silent = LaunchingWorker(tells=False)
    executor, waiting, second = two_steps(silent)
    silent.may_launch.set()
    silent.may_end.set()
    waiting.join(LONG_S)
    assert not waiting.is_alive() and second.result().token_ids == [(1,)]
    executor.close()


class IdlingWorker(GatedWorker):
    """Has three things to do while it waits."""

    def __init__(self, *, error: BaseException | None = None) -> None:
        super().__init__()
        self.gate.set()
        self.left, self.error = 3, error
        self.is_done = threading.Event()

    def idle(self) -> bool:
        self._do("idle")
        if self.error is not None:
            self.is_done.set()
            raise self.error
        self.left -= 1
        if self.left == 0:
            self.is_done.set()
        return self.left > 0


def test_a_worker_that_waits_does_what_is_left_to_do() -> None:
    """A piece at a time, by its own thread, until nothing is left; steps come before and behind. Red if it is asked again and again."""
    worker = IdlingWorker()
    executor = ThreadExecutor(worker)
    assert hand_over(executor, 0).result().token_ids == [(0,)]
    assert worker.is_done.wait(LONG_S)
    assert hand_over(executor, 1).result().token_ids == [(1,)]
    executor.close()
    steps = [what for what in worker.calls if what != "idle"]
    assert steps == ["execute 0", "sample 0", "execute 1", "sample 1", "close"] and len(worker.threads) == 1
    assert worker.calls.count("idle") <= 4, "three pieces, and perhaps a look whether there are more"


def test_a_step_does_not_wait_for_all_that_is_left() -> None:
    """Between two pieces the worker looks for steps. Red if it goes on while one waits."""
    worker = IdlingWorker()
    worker.left = 1 << 60
    executor = ThreadExecutor(worker)
    while "idle" not in worker.calls:
        time.sleep(0.001)
    assert hand_over(executor, 0).result().token_ids == [(0,)]
    executor.close()


def test_what_fails_while_nothing_runs_is_raised_by_the_next_step() -> None:
    """It ends the engine, as a step that fails does."""
    worker = IdlingWorker(error=MemoryError("no pages"))
    executor = ThreadExecutor(worker)
    assert worker.is_done.wait(LONG_S)
    with pytest.raises(MemoryError, match="no pages"):
        hand_over(executor, 0).result()
    executor.close()


@pytest.mark.parametrize("where", ["execute 1", "sample 1"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_is_raised_where_the_result_is_asked_for(where: str, error: BaseException) -> None:
    """What came before is fine, what comes after never runs. Red if the thread dies of it: then results are waited for for ever."""
    worker = GatedWorker(errors={where: error})
    worker.gate.set()
    executor = ThreadExecutor(worker)
    futures = [hand_over(executor, step) for step in range(3)]
    assert futures[0].result().token_ids == [(0,)]
    for future in futures[1:]:
        with pytest.raises(type(error)) as raised:
            future.result()
        assert raised.value is error
    executor.close()
    assert worker.calls[-2:] == [where, "close"]


def test_close_waits_for_the_call_that_runs_and_drops_the_rest() -> None:
    """Red if the worker is closed under a running forward, if queued plans are still computed, or if somebody is left waiting."""
    worker = GatedWorker()
    executor = ThreadExecutor(worker)
    futures = [hand_over(executor, 0), hand_over(executor, 1)]
    assert worker.has_begun.wait(LONG_S)
    closing = threading.Thread(target=executor.close)
    closing.start()
    while not executor._thread.is_closed:
        time.sleep(0.001)
    assert worker.calls == []
    worker.gate.set()
    closing.join(LONG_S)
    assert worker.calls == ["execute 0", "close"]
    assert not executor._thread._thread.is_alive()
    for future in futures:
        with pytest.raises(EngineDeadError, match="was closed"):
            future.result()
    with pytest.raises(EngineDeadError, match="was closed"):
        executor.execute(StepPlan(2))
    executor.close()
    assert worker.calls == ["execute 0", "close"]


def test_close_tells_what_closing_the_worker_raised() -> None:
    """Once; and the thread is gone."""
    executor = ThreadExecutor(GatedWorker(errors={"close": OSError("no")}))
    with pytest.raises(OSError, match="no"):
        executor.close()
    assert not executor._thread._thread.is_alive()
    executor.close()


def test_an_idle_thread_sleeps() -> None:
    """Red if it asks for work again and again."""
    worker = GatedWorker()
    worker.gate.set()
    executor = ThreadExecutor(worker)
    hand_over(executor, 0).result()
    ident = executor._thread._thread.ident
    assert ident is not None
    clock = time.pthread_getcpuclockid(ident)
    before_s = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before_s < 0.03, "processor time of the thread, not of the clock on the wall"
    executor.close()


def test_an_executor_that_is_dropped_ends_its_thread() -> None:
    """Red if the thread keeps the executor alive: worker and weights would stay for the life of the process."""
    worker = GatedWorker()
    executor = ThreadExecutor(worker)
    thread = executor._thread._thread
    del executor
    gc.collect()
    thread.join(LONG_S)
    assert not thread.is_alive()
    assert worker.calls == ["close"]


def test_the_interpreter_waits_for_a_forward_and_ends() -> None:
    """A program that never closes its engine. Red if it hangs, or if the thread is torn down inside a forward."""
    program = """
import threading, time
from xllm_core.engine.executor import ThreadExecutor
from xllm_core.types import StepPlan, StepResult

has_begun = threading.Event()

class Slow:
    def execute(self, plan):
        print("begun", flush=True)
        has_begun.set()
        time.sleep(0.3)
        print("ended", flush=True)
    def sample(self, handle):
        return StepResult(())
    def close(self):
        print("closed", flush=True)

executor = ThreadExecutor(Slow())
executor.execute(StepPlan(0))
executor.execute(StepPlan(1))
has_begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["begun", "ended", "closed"]
