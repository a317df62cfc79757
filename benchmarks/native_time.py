"""The time that steps spend in xllm-cpu's native functions: a timer around each call. What is left of a step is Python, torch's ops included."""

from __future__ import annotations

import time
from typing import Any

_OF_STEPS = ("attention_lay_out", "sample", "replay")
"""Called in steps and not recorded in graphs; those that are come on top."""


class _Timed:
    """One function, which adds to a common sum."""

    def __init__(self, function: Any, sums: list[float]) -> None:
        self._function, self._sums, self.argtypes = function, sums, function.argtypes

    def __call__(self, *arguments: Any) -> Any:
        started_s = time.perf_counter()
        answer = self._function(*arguments)
        self._sums[0] += time.perf_counter() - started_s
        return answer


def install() -> list[float]:
    """Time the kernels that an engine of this process will use. Before it starts. Returns a list of one: seconds so far, to be read and set."""
    from xllm_cpu.graphs import _ROWS_AT
    from xllm_cpu.native import load

    native, sums = load("auto"), [0.0]
    for name in (*_ROWS_AT, *_OF_STEPS):
        setattr(native, name, _Timed(getattr(native, name), sums))
    return sums
