"""The device backend on torch_npu's real runtime code, over host memory."""

from __future__ import annotations

import pytest
import torch
from xllm_ascend.device import NpuDevice

from xllm_core.plugins import ConfigError


def test_two_devices_are_two() -> None:
    """Each has its own memory, current device and name; a third is refused. Killed by: an index that is dropped."""
    first, second = NpuDevice(0), NpuDevice(1)
    free = second.memory().free_bytes
    there = second.allocate((1 << 25,), torch.int8)
    assert str(there.device) == second.facts().torch_device == "npu:1"
    assert second.memory().free_bytes <= free - (1 << 25)
    assert str(first.to_device(torch.ones(3)).device) == "npu:0"
    with pytest.raises(RuntimeError, match="npu:1 among those of npu:0"):
        first.to_device(torch.ones(1 << 25, dtype=torch.int8)).add_(there)
    with pytest.raises(ConfigError, match="indices here are 0 to 1"):
        NpuDevice(2)


def test_a_full_device_says_how_full() -> None:
    """torch_npu's own refusal becomes a MemoryError with both numbers. Killed by: an error of torch that the core does not know."""
    device = NpuDevice(0)
    num_bytes = device.memory().free_bytes * 3 // 5
    held = device.allocate((num_bytes,), torch.int8)
    with pytest.raises(
        MemoryError, match=rf"cannot allocate {num_bytes} bytes .* of {device.memory().total_bytes} bytes are free"
    ):
        device.allocate((num_bytes,), torch.int8)
    assert len(held) == num_bytes
    del held
    torch.npu.empty_cache()


def test_copies_go_through_pinned_memory() -> None:
    """And what is written to the host afterwards does not arrive. Killed by: a copy from the caller's own memory."""
    device = NpuDevice(0)
    host = device.host_buffer((1000,), torch.int64)
    assert host.is_pinned() and not host.any()
    host.fill_(3)
    there = device.to_device(host)
    host.fill_(4)
    device.synchronize()
    assert there.cpu().unique().tolist() == [3]


def test_synchronize_waits() -> None:
    """A copy to the host that need not wait is there after `synchronize`, and on the soft device not before. Killed by: one that returns at once."""
    device = NpuDevice(0)
    there, host = device.to_device(torch.arange(1, 9)), device.host_buffer((8,), torch.int64)
    host.copy_(there, non_blocking=True)
    assert not host.any()
    device.synchronize()
    assert host.tolist() == list(range(1, 9))


def test_streams_and_events() -> None:
    """torch_npu's streams and events work on the soft runtime, so that what uses them can be tested here."""
    device = NpuDevice(0)
    stream, start, end = torch.npu.Stream(), torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    assert stream != torch.npu.current_stream()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        start.record()
        result = device.to_device(torch.ones(4)) + 1
        end.record()
    stream.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0 and result.cpu().tolist() == [2.0] * 4


def test_memory_that_no_kernel_wrote_is_not_zero() -> None:
    """The soft device cannot pass by luck: what it computes nothing for is NaN. Killed by: a runtime that hands out zeroed pages."""
    torch.npu.empty_cache()
    assert torch.empty(3 << 20, dtype=torch.bfloat16, device="npu").cpu().isnan().all()


def test_noise_without_float64_is_the_same_noise() -> None:
    """torch_npu makes float32 of float64; the core's noise asks for it. Seeded answers stay the same up to a rounding. Killed by: noise that
    loses its bits.
    """
    from xllm_core.plugins import gumbel, stream_keys

    keys, ids = stream_keys([1, 2, 3], [0, 1, 2], [5, 70, 900]).unsqueeze(-1), torch.arange(50_000)
    device = NpuDevice(0)
    here = gumbel(keys, ids)
    there = gumbel(device.to_device(keys), device.to_device(ids)).cpu()
    assert there.dtype == torch.float32 and torch.isfinite(there).all()
    assert float((here - there).abs().max()) < 1e-6 or float(((here - there).abs() > 1e-6).float().mean()) < 1e-4
