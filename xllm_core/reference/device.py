"""The reference device: one CPU, plain PyTorch, no promises beyond being right."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.device import DeviceFacts, MemoryInfo

_CGROUP = Path("/sys/fs/cgroup")


class ReferenceDevice:
    """The CPU as `contracts.device.DeviceBackend`. Work is synchronous, so nothing here waits or copies.

    index: must be 0, there is one CPU.
    """

    def __init__(self, index: int = 0) -> None:
        if index != 0:
            raise ConfigError(f"[device] index = {index}: the reference device is the CPU and has only index 0")

    def facts(self) -> DeviceFacts:
        """float32 first: the reference is asked for truth more often than for speed.

        torch's own matrix products choose their order of summation by the number of rows: rows are not invariant.
        """
        return DeviceFacts(
            kind="reference",
            name=f"reference CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
            torch_device="cpu",
            dtypes=("float32", "bfloat16"),
            is_row_invariant=False,
        )

    def memory(self) -> MemoryInfo:
        """Memory of this machine or of the container around us, whichever is smaller."""
        total, free = _machine_memory()
        limit = _read_number(_CGROUP / "memory.max")
        if limit is not None and limit < total:
            used = _read_number(_CGROUP / "memory.current") or 0
            total, free = limit, min(free, max(0, limit - used))
        return MemoryInfo(total_bytes=total, free_bytes=free)

    def peak_memory_bytes(self) -> int:
        """The process's highest resident size; weights that are mapped and touched count."""
        if sys.platform == "win32":
            raise ConfigError("the peak memory of a process is not known on Windows; run without memory reporting")
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed; the operating system hands out the pages when they are first touched."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        try:
            # numpy asks for zeroed pages, torch would write the zeros: gigabytes of cache are touched only as they fill.
            return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(tuple(shape))
        except MemoryError as error:
            raise MemoryError(
                f"cannot allocate {num_bytes} bytes for shape {tuple(shape)}; {self.memory().free_bytes} bytes are free"
            ) from error

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory: it is the device's own."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """The same tensor: host and device memory are one here."""
        return host

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def num_threads(self) -> int:
        """torch's threads inside one op."""
        return torch.get_num_threads()

    def set_num_threads(self, count: int) -> None:
        """torch's, for the whole process."""
        torch.set_num_threads(count)


def _machine_memory() -> tuple[int, int]:
    """(total, available) bytes. Linux knows what caches would give back; elsewhere the free pages must do."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        return total, free
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        raise ConfigError("the size of this machine's memory is not known here; set [kv] memory_bytes")
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    # macOS does not count free pages; half of the memory is a careful guess that a setting can correct.
    return total, os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in names else total // 2


def _read_number(path: Path) -> int | None:
    """The number in a one-line file; None if there is no file or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
