"""This processor as a device."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from xllm_core.plugins import ConfigError, DeviceFacts, MemoryInfo
from xllm_cpu.graphs import Arena, CpuGraph, capture
from xllm_cpu.native import load

_CGROUP = Path("/sys/fs/cgroup")
_LINE = 64
_HUGE = 2 << 20
# What lies before the first huge page of a piece of memory. A short request takes so much of a layer's KV cache, and a huge page of every layer would
# be more to clear, and to hold, than its forward computes.
_HEAD = 256 << 10
_ROOM = _HEAD + (64 << 20)
# Numbers of glibc's `mallopt`, and what is kept of memory that was freed: some steps' tensors.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _MOST_MAPPED = 64 << 20, 32 << 20
# Python maps memory that is shared with children, which Linux keeps in small pages unless told otherwise for all of the system.
_PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class CpuDevice:
    """The CPU as a `GraphDevice` and a `LazyMemoryDevice`. Work is synchronous; memory is the process's own.

    index: must be 0. isa: instruction set of the kernels. torch is given one thread: its own would wait in a loop beside ours, and what the
    core leaves to it between two of our ops is small.
    """

    def __init__(self, index: int = 0, *, isa: str = "auto") -> None:
        if index != 0:
            raise ConfigError(f"[device] index = {index}: cpu/cpu has only index 0; all its cores are one device")
        self.native = load(isa)
        self._room: torch.Tensor | None = None
        self._used = 0
        self._arena = Arena(self.allocate)
        self.set_num_threads(_num_cores())
        torch.set_num_threads(1)
        _keep_freed_memory()

    def facts(self) -> DeviceFacts:
        """bfloat16 first: half the bytes of a step. Rows are equal to the bit whatever runs beside them."""
        return DeviceFacts(
            kind="cpu", name=f"CPU ({platform.machine()}, {self.native.name}, {self.num_threads()} threads)", torch_device="cpu",
            dtypes=("bfloat16", "float32"), is_row_invariant=True,
        )  # fmt: skip

    def memory(self) -> MemoryInfo:
        """Of this machine, or of the container around the process if that is less."""
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        free = _available_bytes() or total // 2
        limit = _number(_CGROUP / "memory.max")
        if limit is not None and limit < total:
            total, free = limit, min(free, max(0, limit - (_number(_CGROUP / "memory.current") or 0)))
        return MemoryInfo(total_bytes=total, free_bytes=free)

    def peak_memory_bytes(self) -> int:
        """The process's highest resident size."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed pages of the system's, touched when first used; of large memory all but begin and rest are huge, where the system has them."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        is_large = num_bytes >= _HEAD + _HUGE and hasattr(mmap, "MADV_HUGEPAGE")
        try:
            memory = mmap.mmap(-1, max(1, num_bytes + _HUGE if is_large else num_bytes), **_PRIVATE)
        except (OSError, MemoryError, OverflowError) as error:
            raise MemoryError(
                f"cannot allocate {num_bytes} bytes for shape {tuple(shape)}; {self.memory().free_bytes} bytes are free"
            ) from error
        pages = np.frombuffer(memory, dtype=np.uint8)
        first = 0
        if is_large:
            first = -(pages.ctypes.data + _HEAD) % _HUGE  # a huge page begins where one may begin
            memory.madvise(mmap.MADV_HUGEPAGE, first + _HEAD, (num_bytes - _HEAD) // _HUGE * _HUGE)
        return torch.from_numpy(pages[first : first + num_bytes]).view(dtype).view(tuple(shape))

    def populate(self, tensor: torch.Tensor) -> None:
        """As `LazyMemoryDevice`."""
        self.native.populate(tensor.data_ptr(), tensor.numel() * tensor.element_size())

    def packed_weight(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for one weight, beside those before it in huge pages: a step reads all of them, and small pages cost more to find than to read."""
        size = -(-num_elements * dtype.itemsize // _LINE) * _LINE
        if self._room is None or self._used + size > self._room.numel():
            self._room, self._used = self.allocate((max(size, _ROOM),), torch.uint8), 0
        taken = self._room[self._used : self._used + num_elements * dtype.itemsize]
        self._used += size
        return taken.view(dtype)

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory: it is the device's own."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """The same tensor."""
        return host

    def capture(self, run: Callable[[], torch.Tensor], max_rows: int) -> tuple[CpuGraph, torch.Tensor]:
        """Native calls with their arguments; see `GraphDevice`."""
        return capture(self.native, self._arena, run, max_rows)

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def num_threads(self) -> int:
        """Threads that share one op, the caller's included."""
        count: int = self.native.threads()
        return count

    def set_num_threads(self, count: int) -> None:
        """For every engine of this process that uses the same instruction set."""
        self.native.set_threads(count)


def _num_cores() -> int:
    """Cores that the process may use, or as many as `OMP_NUM_THREADS` says, which users and batch systems set for every such library."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def _keep_freed_memory() -> None:
    """Let the next step's tensors have the memory of this one's. glibc gives it back to the system in between, which clears every page anew: 3 % of
    what a prompt takes. Whoever tunes it by `MALLOC_...` variables is left alone.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other libraries than glibc have none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MOST_MAPPED)
        mallopt(_TRIM_THRESHOLD, _KEPT)


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
