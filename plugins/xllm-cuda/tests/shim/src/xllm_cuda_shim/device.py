"""The CPU under the name of a GPU: what its kernels compute is real, where they compute it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xllm_core.plugins import DeviceFacts, MemoryInfo

TOTAL_BYTES = 8 << 30


@dataclass(slots=True)
class ShimGraph:
    """Launches what was recorded again, over the same tensors: what a kernel reads from a plan, it reads from where the plan was recorded."""

    run: Callable[[], torch.Tensor]
    result: torch.Tensor
    num_ops: int = 1
    arena_bytes: int = 0

    def replay(self, num_rows: int) -> None:
        """All rows, padding too."""
        self.result.copy_(self.run())


class ShimDevice:
    """`GraphDevice` and `AsyncDevice` of kind "cuda" whose memory is the host's. No bfloat16: the interpreter computes it wrongly."""

    def __init__(self, index: int = 0) -> None:
        self._allocated_bytes = 0

    def facts(self) -> DeviceFacts:
        """Like the GPU's, but for what cannot be had here."""
        return DeviceFacts(
            kind="cuda", name="CPU as cuda, kernels interpreted", torch_device="cpu", dtypes=("float32", "float16")
        )

    def memory(self) -> MemoryInfo:
        """A made-up card of 8 GiB."""
        return MemoryInfo(TOTAL_BYTES, TOTAL_BYTES - self._allocated_bytes)

    def peak_memory_bytes(self) -> int:
        """What was allocated."""
        return self._allocated_bytes

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes > self.memory().free_bytes:
            raise MemoryError(f"cannot allocate {num_bytes} bytes; {self.memory().free_bytes} bytes are free")
        self._allocated_bytes += num_bytes
        return torch.zeros(tuple(shape), dtype=dtype)

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A copy, as a GPU makes one: what is written to `host` later is not seen."""
        return host.clone()

    def to_host(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What is there now, when it is asked for."""
        copy = tensor.clone()
        return lambda: copy

    def capture(self, run: Callable[[], torch.Tensor], max_rows: int) -> tuple[ShimGraph, torch.Tensor]:
        """Twice, as the GPU needs it."""
        run()
        result = run()
        return ShimGraph(run, result), result

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def num_threads(self) -> int:
        """torch's."""
        return torch.get_num_threads()

    def set_num_threads(self, count: int) -> None:
        """torch's."""
        torch.set_num_threads(count)
