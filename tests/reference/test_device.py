"""The reference device tells the truth about this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xllm_core.errors import ConfigError
from xllm_core.reference import device as device_module
from xllm_core.reference.device import ReferenceDevice


def test_facts_and_memory() -> None:
    """Killed by: kilobytes taken for bytes, free above total."""
    device = ReferenceDevice(0)
    assert (device.facts().kind, device.facts().torch_device) == ("reference", "cpu")
    memory = device.memory()
    assert 2**28 < memory.total_bytes < 2**48
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 2**24 < device.peak_memory_bytes() < memory.total_bytes
    assert device.num_threads() >= 1


def test_a_container_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed by: reading only the machine's memory, where the container would be killed at a tenth of it."""
    monkeypatch.setattr(device_module, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("30000000\n")
    memory = ReferenceDevice(0).memory()
    assert (memory.total_bytes, memory.free_bytes) == (100_000_000, 70_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert ReferenceDevice(0).memory().total_bytes > 100_000_000


def test_tensors_are_zeroed_and_impossible_ones_say_their_size() -> None:
    """Killed by: uninitialised memory, a bare RuntimeError."""
    device = ReferenceDevice(0)
    assert not device.allocate((3, 4), torch.bfloat16).any()
    host = device.host_buffer((5,), torch.int32)
    host.numpy()[:] = 7
    assert device.to_device(host).tolist() == [7] * 5
    with pytest.raises(MemoryError, match=str(2**62)):
        device.allocate((2**60,), torch.float32)


def test_there_is_one_cpu() -> None:
    """Killed by: ignoring the index."""
    with pytest.raises(ConfigError, match="index = 1"):
        ReferenceDevice(1)
