"""Where a plan runs. The engine sees handles and futures; a worker may be this process, a thread, or another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from xllm_core.types import StepPlan, StepResult, StepTimes


class StepHandle(Protocol):
    """A forward under way."""

    times: StepTimes


class StepFuture(Protocol):
    """Tokens under way. `result` waits, and raises what the worker raised."""

    def result(self) -> StepResult:
        """The outcome of the step."""


class StepWorker(Protocol):
    """What an executor drives; `xllm_core.runtime.worker.Worker` is one."""

    def execute(self, plan: StepPlan) -> StepHandle:
        """Apply the plan's state changes and run the forward."""

    def sample(self, handle: Any) -> StepResult:
        """Choose tokens from the logits of what `execute` returned; it knows its own kind of handle."""

    def close(self) -> None:
        """Give back memory and threads."""


class Executor(Protocol):
    """Runs plans in the order given. `execute` and `sample` may return before the work is done."""

    def execute(self, plan: StepPlan) -> StepHandle:
        """Hand over a plan."""

    def sample(self, handle: StepHandle) -> StepFuture:
        """Ask for its tokens."""

    def close(self) -> None:
        """Stop the worker."""


@dataclass(frozen=True, slots=True)
class _Done:
    """A result that is there already."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class InProcessExecutor:
    """One worker in the caller's thread; everything is done when a call returns, so a deeper queue changes nothing but the order of calls."""

    def __init__(self, worker: StepWorker) -> None:
        self._worker = worker

    def execute(self, plan: StepPlan) -> StepHandle:
        """Run the forward now."""
        return self._worker.execute(plan)

    def sample(self, handle: StepHandle) -> StepFuture:
        """Choose tokens now: the next forward may ask for them (`prev_rows`)."""
        return _Done(self._worker.sample(handle))

    def close(self) -> None:
        """Close the worker."""
        self._worker.close()
