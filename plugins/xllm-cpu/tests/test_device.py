"""Memory as the device gives it out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from xllm_cpu.device import CpuDevice

_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kb(address: int) -> int:
    """How much of the mapping around an address lies in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if rest and all(c in "0123456789abcdef" for c in first):
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no mapping around the address")


@pytest.mark.skipif(
    not _MODE.exists() or "[never]" in _MODE.read_text(), reason="this system has transparent huge pages switched off"
)
def test_large_memory_is_in_huge_pages() -> None:
    """A step reads all weights; one core reads twice as fast where pages are large. Dies with a mapping that the system may not use them for."""
    tensor = CpuDevice(0).allocate((64 << 20,), torch.uint8)
    tensor.fill_(1)
    assert tensor.data_ptr() % (2 << 20) == 0
    assert huge_kb(tensor.data_ptr()) >= 32 << 10, "less than half of it"


@pytest.mark.parametrize("shape", [(0,), (3, 5), (1 << 20, 3)])
def test_memory_is_zeroed_and_its_own(shape: tuple[int, ...]) -> None:
    """Of any size, and as large as asked for."""
    device = CpuDevice(0)
    first, second = (device.allocate(shape, torch.float32) for _ in range(2))
    assert first.shape == shape and not first.any()
    first.fill_(7)
    assert not second.any()


def test_more_than_there_is() -> None:
    """A message with both numbers."""
    with pytest.raises(MemoryError, match="cannot allocate 4503599627370496 bytes"):
        CpuDevice(0).allocate((1 << 52,), torch.uint8)
