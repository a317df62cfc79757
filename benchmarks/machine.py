"""The conditions under which a figure was taken: memory bandwidth, load, versions. Figures without them are not comparable."""

from __future__ import annotations

import os
import platform
import time
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SETTLE_S = 0.5
"""After every round of an engine, outside of what is measured: what it has put off until nothing runs (ours gets pages for its next tokens) must
not fall into the next engine's round, or into a probe of the machine."""

_PROBE_BYTES = 256 << 20  # well beyond any cache
_PASSES = 5


def use_all_cores() -> None:
    """Before a probe: whoever made a CPU device in this process has left torch one thread."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def read_bandwidth_gb_s() -> float:
    """Best of a few sequential reads of 256 MiB by all torch threads, in GB/s."""
    import torch

    use_all_cores()
    data = torch.ones(_PROBE_BYTES // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(_PASSES):
        started_s = time.perf_counter()
        data.sum()
        best = max(best, _PROBE_BYTES / (time.perf_counter() - started_s) / 1e9)
    return round(best, 2)


def peak_gflops() -> float:
    """Best of a few products of 1,024 cubed, by torch, in `peak_dtype`."""
    use_all_cores()
    kind = peak_dtype()
    return round(2 * 1024**3 / min(_product_s(1024, kind) for _ in range(12)) / 1e9, 1)


@cache
def peak_dtype() -> torch.dtype:
    """bfloat16, or float32 where the processor multiplies nothing narrower and bfloat16, emulated, takes 50 times as long. Asked once."""
    import torch

    use_all_cores()
    return min((torch.bfloat16, torch.float32), key=lambda kind: min(_product_s(1024, kind) for _ in range(3)))


def _product_s(size: int, kind: torch.dtype) -> float:
    import torch

    a, b = (torch.randn(size, size).to(kind) for _ in range(2))
    started_s = time.perf_counter()
    a @ b
    return time.perf_counter() - started_s


def conditions() -> dict[str, Any]:
    """Machine, versions and load right now."""
    import torch

    return {
        "cpu": _cpu_name(), "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "load": [round(x, 2) for x in os.getloadavg()], "python": platform.python_version(),
        "torch": torch.__version__, "read_gb_s": read_bandwidth_gb_s(),
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
