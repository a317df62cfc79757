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
    middle = tensor.data_ptr() + (32 << 20)
    assert huge_kb(middle) >= 32 << 10, "less than half of it"


def resident_kb() -> int:
    """Of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell what is resident")
def test_a_short_request_touches_little_of_a_cache() -> None:
    """100 KB of each of 40 large tensors are 4 MB. Dies where memory begins with a huge page: 80 MB are then cleared for the first token."""
    device = CpuDevice(0)
    tensors = [device.allocate((8 << 20,), torch.uint8) for _ in range(40)]
    before = resident_kb()
    for tensor in tensors:
        tensor[: 100 << 10] = 1
    assert resident_kb() - before < 20 << 10


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell what is resident")
def test_a_full_cache_takes_what_it_holds() -> None:
    """Dies where the last huge page of a tensor reaches beyond its end."""
    device = CpuDevice(0)
    tensors = [device.allocate(((4 << 20) + (300 << 10),), torch.uint8) for _ in range(20)]
    before = resident_kb()
    for tensor in tensors:
        tensor.fill_(1)
    assert resident_kb() - before < 20 * (4 << 10) + 20 * 300 + (8 << 10)


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
