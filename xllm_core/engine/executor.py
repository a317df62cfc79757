"""Where a plan runs. The engine sees handles and futures; a worker may be this process, a thread, or another process."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from xllm_core.errors import EngineDeadError
from xllm_core.types import PendingResult, StepPlan, StepResult, StepTimes

T = TypeVar("T")

IDLE_AFTER_S = 0.01
"""Without a step to compute: longer than an engine that has requests needs to plan one."""


class StepHandle(Protocol):
    """A forward under way. times: whole when the result of the step is there, not before."""

    @property
    def times(self) -> StepTimes:
        """What the step cost."""


class StepFuture(Protocol):
    """Tokens under way. `result` waits, and raises what the worker raised."""

    def result(self) -> StepResult:
        """The outcome of the step."""


class StepWorker(Protocol):
    """What an executor drives, from one thread, which need not be the one that built it; `xllm_core.runtime.worker.Worker` is one."""

    def execute(self, plan: StepPlan) -> StepHandle:
        """Apply the plan's state changes and run the forward."""

    def sample(self, handle: Any) -> StepResult | PendingResult:
        """Choose tokens from the logits of what `execute` returned; it knows its own kind of handle. Pending tokens are waited for by whoever
        wants them, while the worker goes on with the next plan.
        """

    def close(self) -> None:
        """Give back memory and threads."""


@runtime_checkable
class TellingWorker(StepWorker, Protocol):
    """A `StepWorker` that calls `on_launch` in `execute` as soon as all that is left is the device's work.

    Until then the worker's Python is what a step waits for, and whoever got the tokens of the step before would take the interpreter from it.
    """

    on_launch: Callable[[], None]


@runtime_checkable
class IdleWorker(StepWorker, Protocol):
    """A `StepWorker` that has something to do while no step is to be computed."""

    def idle(self) -> bool:
        """Do a little of it, a millisecond or so: a step may come. False if nothing is left for now."""


class Executor(Protocol):
    """Runs plans in the order given. `execute` and `sample` may return before the work is done."""

    def execute(self, plan: StepPlan) -> StepHandle:
        """Hand over a plan, which belongs to the worker from now on: read it, but change nothing in it."""

    def sample(self, handle: StepHandle) -> StepFuture:
        """Ask for its tokens."""

    def close(self) -> None:
        """Stop the worker."""


@dataclass(frozen=True, slots=True)
class _Done:
    """A result that is there already."""

    value: StepResult | PendingResult

    def result(self) -> StepResult:
        return self.value.result() if isinstance(self.value, PendingResult) else self.value


class InProcessExecutor:
    """One worker in the caller's thread; the host's part is done when a call returns, so a deeper queue helps only a device that goes on alone."""

    def __init__(self, worker: StepWorker) -> None:
        self._worker = worker

    def execute(self, plan: StepPlan) -> StepHandle:
        """Run the forward now, or launch it."""
        return self._worker.execute(plan)

    def sample(self, handle: StepHandle) -> StepFuture:
        """Choose tokens now: the next forward may ask for them (`prev_rows`)."""
        return _Done(self._worker.sample(handle))

    def close(self) -> None:
        """Close the worker."""
        self._worker.close()


class WorkerThread:
    """The one thread in which a worker is built and computes, so that the engine plans a step while the one before runs.

    All that the worker asks of torch belongs here, loading included. An OpenMP runtime keeps a team of threads for every thread that ever
    ran a parallel loop; once the teams have more members than the machine has cores, libgomp puts waiting members to sleep at every
    barrier instead of letting them spin, and a forward of short loops takes half as long again.

    Jobs run in the order given. After the first step that fails nothing runs any more: every later result raises that error. The thread
    sleeps while there is nothing to do; it ends with `close`, when nobody holds this object any more, or when the interpreter ends.
    """

    def __init__(self) -> None:
        self._driver = _Driver()
        self._thread = threading.Thread(target=self._driver.run, name="xllm-worker", daemon=True)
        # The thread holds the driver, not this: an engine that is dropped without `close` does not live on in it.
        self._stop = weakref.finalize(self, self._driver.stop)
        self._thread.start()
        _open.add(self)

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more jobs."""
        return not self._stop.alive

    def call(self, function: Callable[[], T]) -> T:
        """Run a function there and wait for it; raises what it raised. An interrupt of the wait ends the thread after the function."""
        job = _Call(function)
        self.put(job)
        try:
            return job.result()
        except BaseException:
            self._stop()
            raise

    def attach(self, worker: StepWorker) -> None:
        """From now on steps go to this worker, which `close` closes."""
        self._driver.attach(worker)

    def put(self, job: _ThreadHandle | _ThreadFuture | _Call[Any]) -> None:
        """Queue a job. Raises EngineDeadError after `close`."""
        if self.is_closed:
            raise _closed()
        self._driver.jobs.put(job)

    def close(self) -> None:
        """Let the call that runs now end, drop what comes after it, close the worker, end the thread. Raises what closing the worker raised.

        Safe to call twice, and after an interrupt.
        """
        self._stop()
        self._thread.join()
        _open.discard(self)
        error, self._driver.close_error = self._driver.close_error, None
        if error is not None:
            raise error


class ThreadExecutor:
    """A worker on a thread of its own. thread: the one in which the worker was built; without it a new one."""

    def __init__(self, worker: StepWorker, thread: WorkerThread | None = None) -> None:
        self._thread = thread if thread is not None else WorkerThread()
        self._thread.attach(worker)

    def execute(self, plan: StepPlan) -> StepHandle:
        """Hand the plan over; returns at once. Raises EngineDeadError after `close`."""
        handle = _ThreadHandle(plan)
        self._thread.put(handle)
        return handle

    def sample(self, handle: StepHandle) -> StepFuture:
        """Ask for the tokens of a handle of this executor; returns at once."""
        assert isinstance(handle, _ThreadHandle)
        future = _ThreadFuture(handle)
        self._thread.put(future)
        return future

    def close(self) -> None:
        """As `WorkerThread.close`."""
        self._thread.close()


class _ThreadHandle:
    """A plan that waits for the worker, is there, or was. own: the worker's handle, set by its thread."""

    __slots__ = ("own", "plan")

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.own: StepHandle | None = None

    @property
    def times(self) -> StepTimes:
        return self.own.times if self.own is not None else StepTimes()

    def run(self, worker: StepWorker) -> None:
        self.own = worker.execute(self.plan)

    def settle(self, failure: BaseException | None) -> None:
        """Nobody waits for a forward, only for its tokens."""


class _ThreadFuture:
    """Tokens that the worker's thread owes. It holds the lock until it has settled them: the cheapest way to wait that Python has."""

    __slots__ = ("_error", "_handle", "_lock", "_value")

    def __init__(self, handle: _ThreadHandle) -> None:
        self._handle = handle
        self._value: StepResult | PendingResult | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._lock.acquire()

    def result(self) -> StepResult:
        with self._lock:
            pass
        if self._value is None:
            assert self._error is not None
            raise self._error
        return self._value.result() if isinstance(self._value, PendingResult) else self._value

    def run(self, worker: StepWorker) -> None:
        self._value = worker.sample(self._handle.own)

    def settle(self, failure: BaseException | None) -> None:
        self._error = failure
        self._lock.release()


class _Call(Generic[T]):
    """A function that somebody waits for. What it raises is its caller's; steps may follow."""

    __slots__ = ("_error", "_function", "_lock", "_value")

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._value: T | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._lock.acquire()

    def result(self) -> T:
        with self._lock:
            pass
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def run(self, worker: StepWorker | None) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001  raised again by `result`
            self._error = error

    def settle(self, failure: BaseException | None) -> None:
        self._error = self._error or failure
        self._lock.release()


class _Driver:
    """What the thread runs. jobs: in the order of the calls, None at the end.

    Tokens are told at once, unless the next step waits already and its worker tells when it is launched: then they are owed until that.
    """

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_ThreadHandle | _ThreadFuture | _Call[Any] | None] = queue.SimpleQueue()
        self.worker: StepWorker | None = None
        self.close_error: BaseException | None = None
        self._failure: BaseException | None = None
        self._owed: _ThreadFuture | None = None
        self._is_telling = False
        self._idle: Callable[[], bool] | None = None

    def attach(self, worker: StepWorker) -> None:
        self.worker = worker
        self.jobs.put(_Call(lambda: None))  # the thread looks who its worker is
        self._idle = worker.idle if isinstance(worker, IdleWorker) else None
        self._is_telling = isinstance(worker, TellingWorker)
        if isinstance(worker, TellingWorker):
            worker.on_launch = self._pay

    def run(self) -> None:
        while (job := self._next()) is not None:
            if self._failure is None:
                try:
                    job.run(self.worker)  # type: ignore[arg-type]
                except BaseException as error:  # noqa: BLE001  whatever it is, it is raised where the result is asked for
                    self._failure = error
            self._pay()
            if isinstance(job, _ThreadFuture) and self._is_telling and self._failure is None and not self.jobs.empty():
                self._owed = job
            else:
                job.settle(self._failure)
            del job  # not to hold a step's logits while waiting for the next
        self._pay()
        try:
            if self.worker is not None:
                self.worker.close()
        except BaseException as error:  # noqa: BLE001  raised again by the caller of `close`
            self.close_error = error
        # The worker knows this object: without a cycle it is gone as soon as nobody asks for it.
        self.worker = self._idle = None

    def _next(self) -> _ThreadHandle | _ThreadFuture | _Call[Any] | None:
        """The next job; while there is none, a worker may do what else it has to do."""
        if self._idle is None or self._failure is not None:
            return self.jobs.get()
        try:
            return self.jobs.get(timeout=IDLE_AFTER_S)
        except queue.Empty:
            pass
        try:
            while self.jobs.empty() and self._idle():
                pass
        except BaseException as error:  # noqa: BLE001  as of a step: raised where the next result is asked for
            self._failure = error
        return self.jobs.get()

    def _pay(self) -> None:
        owed, self._owed = self._owed, None
        if owed is not None:
            owed.settle(None)

    def stop(self) -> None:
        """Drop what has not begun, and end. Also called by the garbage collector, so it takes no lock and waits for nothing."""
        if self._failure is None:
            self._failure = _closed()
        self.jobs.put(None)


def _closed() -> EngineDeadError:
    return EngineDeadError("the engine was closed; start a new one")


_open: weakref.WeakSet[WorkerThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread inside a forward while the interpreter is taken down around it would crash: wait for the end of the call."""
    for thread in list(_open):
        thread.close()
