"""One Ascend NPU as the core sees it. Everything goes through torch_npu's runtime: its allocator, its streams, its pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_npu  # noqa: F401  makes torch.npu

from xllm_core.plugins import ConfigError, DeviceFacts, MemoryInfo

BLOCK_SIZE = 128
"""Tokens of a KV block: the size that CANN's paged attention is tuned for."""


class NpuDevice:
    """`DeviceBackend`. Build it on the thread that uses it: the current device belongs to a thread.

    index: as torch_npu counts visible devices (ASCEND_RT_VISIBLE_DEVICES).
    """

    def __init__(self, index: int = 0) -> None:
        count = torch.npu.device_count()
        if not 0 <= index < count:
            known = (
                f"indices here are 0 to {count - 1}"
                if count
                else "no NPU is visible here; xllm doctor says what is missing"
            )
            raise ConfigError(f"[device] index = {index}: {known}")
        self._device = torch.device("npu", index)
        torch.npu.set_device(self._device)
        # Kernels that are built already, for any shape: the other way compiles each new shape, and every batch has one.
        torch.npu.set_compile_mode(jit_compile=False)
        self._name = torch.npu.get_device_name(index)

    def facts(self) -> DeviceFacts:
        """bfloat16 alone: fused-infer attention has no float32. Rows are not invariant: CANN tiles a product by its number of rows."""
        return DeviceFacts(
            kind="npu",
            name=self._name,
            torch_device=str(self._device),
            dtypes=("bfloat16",),
            block_sizes=(BLOCK_SIZE,),
            is_row_invariant=False,
        )

    def memory(self) -> MemoryInfo:
        """What the driver has, and what torch_npu holds in its cache and would give out again."""
        free, total = torch.npu.mem_get_info(self._device)
        cached = torch.npu.memory_reserved(self._device) - torch.npu.memory_allocated(self._device)
        return MemoryInfo(total_bytes=total, free_bytes=free + cached)

    def peak_memory_bytes(self) -> int:
        """The most that torch_npu has held."""
        peak: int = torch.npu.max_memory_reserved(self._device)
        return peak

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed on the current stream."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        memory = self.memory()
        problem = f"cannot allocate {num_bytes} bytes for shape {tuple(shape)}; {memory.free_bytes} of {memory.total_bytes} bytes are free"
        if num_bytes > memory.total_bytes:
            raise MemoryError(problem)
        try:
            return torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(problem) from error

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Pinned."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Copied to a pinned place of its own, and from there by the NPU on the current stream, while the host goes on.

        The caller may write to `host` at once, also where it is pinned: torch_npu keeps the place in between until the NPU has read it.
        """
        staged = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
        return staged.to(self._device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait for the current stream."""
        torch.npu.current_stream(self._device).synchronize()

    def num_threads(self) -> int:
        """Of torch on the host."""
        return torch.get_num_threads()

    def set_num_threads(self, count: int) -> None:
        """Of torch on the host."""
        torch.set_num_threads(count)
