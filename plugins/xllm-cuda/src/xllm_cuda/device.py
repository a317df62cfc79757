"""One NVIDIA GPU as the core sees it. Everything goes through torch's own CUDA runtime: its allocator, its streams, its pinned memory, its graphs.

Steps are computed on the current stream, and what they read from the host is copied on it too: the host is a step ahead, and to tie two streams
together takes the host longer than the GPU takes for copies of some kilobytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xllm_core.plugins import ConfigError, DeviceFacts, MemoryInfo, NotCapturableError
from xllm_cuda.graphs import CudaGraph, GraphRecorder
from xllm_cuda.probe import MIN_CAPABILITY


class CudaDevice:
    """`GraphDevice` and `AsyncDevice`. Build and use it on one thread: CUDA's current device belongs to a thread, and kernels are launched there.

    index: as CUDA counts visible devices.
    """

    def __init__(self, index: int = 0) -> None:
        count = torch.cuda.device_count()
        if not 0 <= index < count:
            known = (
                f"indices here are 0 to {count - 1}"
                if count
                else "no CUDA device is visible here; xllm doctor says what is missing"
            )
            raise ConfigError(f"[device] index = {index}: {known}")
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY:
            raise ConfigError(
                f"[device] index = {index}: {torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; "
                f"kernels are compiled for {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} and newer"
            )
        self._device = torch.device("cuda", index)
        self._name = torch.cuda.get_device_name(index)
        torch.cuda.set_device(self._device)
        # cuBLAS adds the parts of a sum that it splits in float32, as the definition of `linear` does: torch lets it round them to 16 bits.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._recorder = GraphRecorder(self._device)

    def facts(self) -> DeviceFacts:
        """bfloat16 first. Rows are not invariant: cuBLAS chooses its order of summation by the number of rows."""
        return DeviceFacts(
            kind="cuda",
            name=self._name,
            torch_device=str(self._device),
            dtypes=("bfloat16", "float32"),
            block_sizes=(16, 32, 64, 128),
            is_row_invariant=False,
        )

    def memory(self) -> MemoryInfo:
        """What the driver has, and what torch holds in its cache and would give out again."""
        free, total = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return MemoryInfo(total_bytes=total, free_bytes=free + cached)

    def peak_memory_bytes(self) -> int:
        """The most that torch has held."""
        return torch.cuda.max_memory_reserved(self._device)

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
        """Copied to a pinned place of its own, and from there by the GPU on the current stream, while the host goes on.

        The caller may write to `host` at once, also where it is pinned: torch keeps the place in between until the GPU has read it. Raises
        NotCapturableError while a graph is recorded, which would copy from that place ever after.
        """
        if torch.cuda.is_current_stream_capturing():
            raise NotCapturableError(
                f"a host tensor of shape {tuple(host.shape)} is copied to the device within the forward; a replay would copy the same values again"
            )
        staged = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
        return staged.to(self._device, non_blocking=True)

    def to_host(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Copied to a pinned place on the current stream; who waits for it waits for an event, with the interpreter free."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self._device))

        def wait() -> torch.Tensor:
            arrived.synchronize()
            return host

        return wait

    def capture(self, run: Callable[[], torch.Tensor], max_rows: int) -> tuple[CudaGraph, torch.Tensor]:
        """By CUDA's stream capture; as the contract says."""
        return self._recorder.capture(run, max_rows)

    def synchronize(self) -> None:
        """Wait for the current stream."""
        torch.cuda.current_stream(self._device).synchronize()

    def num_threads(self) -> int:
        """Of torch on the host."""
        return torch.get_num_threads()

    def set_num_threads(self, count: int) -> None:
        """Of torch on the host."""
        torch.set_num_threads(count)
