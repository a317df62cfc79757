"""Recording a forward: CUDA's stream capture, through torch, with one memory pool for all graphs.

While a stream captures nothing runs: launches become the nodes of a graph, with the addresses that their tensors have. So a forward runs once
before, which compiles its kernels and lets cuBLAS take its workspace, both forbidden later; and once more behind, as the first replay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress

import torch

from xllm_core.plugins import NotCapturableError
from xllm_cuda.probe import LIBCUDA


class CudaGraph:
    """A `Graph`. num_ops: nodes of it, 0 where the driver does not count them. arena_bytes: of the pool, with the graphs recorded before.

    Padding is computed: the launches are those of `max_rows` rows.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, max_rows: int, num_ops: int, arena_bytes: int) -> None:
        self.num_ops, self.arena_bytes = num_ops, arena_bytes
        self._graph, self._max_rows = graph, max_rows

    def replay(self, num_rows: int) -> None:
        """On the current stream. An index that is not there ends the process's use of the GPU, as it does op by op: the check is the kernels'."""
        if not 0 < num_rows <= self._max_rows:
            raise ValueError(f"{num_rows} rows do not fit a graph of {self._max_rows}")
        self._graph.replay()


class GraphRecorder:
    """Captures on a stream of its own. Use it on the thread of its device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0

    def capture(self, run: Callable[[], torch.Tensor], max_rows: int) -> tuple[CudaGraph, torch.Tensor]:
        """As `GraphDevice.capture`. `run` is called twice and replayed once: all three do the same to the cache.

        What fails in the first call is no matter of recording, and is raised as it is.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what the first call used is of no use to any other stream
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(self._stream):
            result = self._record(graph, run)
        num_ops = num_nodes(graph.raw_cuda_graph())
        graph.instantiate()
        graph.replay()  # on the current stream: the results of the step, which recording did not compute
        return CudaGraph(graph, max_rows, num_ops, self._pool_bytes), result

    def _record(self, graph: torch.cuda.CUDAGraph, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `run` returns, whose values come with the first replay."""
        result: torch.Tensor | None = None
        problem: Exception | None = None
        # Other threads may allocate meanwhile, e.g. to move KV: only this one's calls are held against the capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        before = torch.cuda.memory_reserved(self._device)
        try:
            result = run()
        except Exception as error:  # noqa: BLE001  it ran a moment ago, so recording is to blame
            problem = error
        self._pool_bytes += torch.cuda.memory_reserved(self._device) - before
        try:
            graph.capture_end()
        except RuntimeError as error:
            problem = problem or error
            self._end_allocation()
        if isinstance(problem, NotCapturableError):
            raise problem
        if problem is not None or result is None:
            first = next(iter(str(problem).splitlines()), "")
            raise NotCapturableError(f"the forward cannot be recorded: {type(problem).__name__}: {first}") from problem
        return result

    def _end_allocation(self) -> None:
        """torch leaves its allocator in the middle of a capture that ends badly, in which tensors of several streams are never given back."""
        with suppress(RuntimeError):  # it had come as far as that
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        torch._C._cuda_releasePool(self._device.index, self._pool)


def num_nodes(graph: int) -> int:
    """Nodes of a `cudaGraph_t`, which is the driver's `CUgraph`; 0 if the driver cannot say."""
    count = ctypes.c_size_t()
    status = ctypes.CDLL(LIBCUDA).cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count))
    return 0 if status else count.value
