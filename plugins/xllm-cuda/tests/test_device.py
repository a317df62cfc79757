"""`CudaDevice` over a model of CUDA's streams: nothing runs before somebody waits for it, and then only what must. So what the device forgets to
wait for has not happened. The model has the signatures of torch's own classes; what a GPU does is not proven by it.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from xllm_cuda import graphs
from xllm_cuda.device import CudaDevice

from xllm_core.plugins import AsyncDevice, GraphDevice, NotCapturableError

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
POOL = (0, 7)


class Gpu:
    """What runs where. capturing: the graph that takes what is submitted. calls: of the allocator, in order."""

    def __init__(self) -> None:
        self.default = Stream()
        self.current, self.streams = self.default, [self.default]
        self.capturing: Graph | None = None
        self.reserved_bytes = 0
        self.calls: list[str] = []

    def submit(self, op: Callable[[], object]) -> None:
        (self.current.queue if self.capturing is None else self.capturing.nodes).append(op)

    def wait(self, device: object = None) -> None:
        """For everything; illegal while a graph is recorded, which it spoils."""
        if self.capturing is not None:
            self.capturing.is_spoilt = True
            raise RuntimeError(f"{NOT_PERMITTED}\nCompile with `TORCH_USE_CUDA_DSA`")
        for stream in reversed(self.streams):  # the last made first, which depends on the others
            stream.synchronize()


class Stream:
    """A queue of work."""

    gpu: Gpu

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.queue: list[Callable[[], object]] = []
        self.num_done = 0
        if device is not None:
            self.gpu.streams.append(self)

    def reach(self, position: int) -> None:
        while self.num_done < position:
            self.num_done += 1
            self.queue[self.num_done - 1]()

    def wait_stream(self, stream: Stream) -> None:
        position = len(stream.queue)
        self.queue.append(lambda: stream.reach(position))

    def wait_event(self, event: Event) -> None:
        stream, position = event.recorded
        self.queue.append(lambda: stream.reach(position))

    def synchronize(self) -> None:
        self.reach(len(self.queue))


class Event:
    """A place in a queue."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.recorded: tuple[Stream, int]

    def record(self, stream: Stream | None = None) -> None:
        assert stream is not None
        self.recorded = stream, len(stream.queue)

    def synchronize(self) -> None:
        stream, position = self.recorded
        stream.reach(position)


class Graph:
    """Work that is queued again at each replay."""

    gpu: Gpu

    def __init__(self, keep_graph: bool = False) -> None:
        self.nodes: list[Callable[[], object]] = []
        self.is_spoilt = self.is_ready = False
        self.keep_graph = keep_graph

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global", check_input_liveness: bool = False
    ) -> None:
        gpu = self.gpu
        assert gpu.current is not gpu.default, "CUDA graphs must be captured on a non-default stream"
        assert (pool, capture_error_mode) == (POOL, "thread_local")
        gpu.capturing = self

    def capture_end(self) -> None:
        self.gpu.capturing = None
        if self.is_spoilt:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def raw_cuda_graph(self) -> int:
        assert self.keep_graph
        return id(self)

    def instantiate(self) -> None:
        self.is_ready = True

    def replay(self) -> None:
        assert self.is_ready
        for node in self.nodes:
            self.gpu.submit(node)


class Pinned(torch.Tensor):
    """A host tensor whose copies are work of the current stream; what they fill holds something else until then."""

    gpu: Gpu

    def to(self, device: torch.device, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
        assert non_blocking and device == torch.device("cuda", 0)
        source = self.as_subclass(torch.Tensor)
        there = torch.full_like(source, -1)
        self.gpu.submit(lambda: there.copy_(source))
        return there

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Pinned:  # type: ignore[override]
        if non_blocking:
            self.gpu.submit(lambda: self.as_subclass(torch.Tensor).copy_(source))
        else:
            self.as_subclass(torch.Tensor).copy_(source)
        return self


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """In the place of torch.cuda's."""
    model = Gpu()
    for kind in (Stream, Graph, Pinned):
        monkeypatch.setattr(kind, "gpu", model, raising=False)

    @contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        before, model.current = model.current, stream
        try:
            yield
        finally:
            model.current = before

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        tensor = real_empty(*shape, **options)
        return tensor.as_subclass(Pinned) if pin_memory else tensor

    def count_nodes(graph: ctypes.c_void_p, nodes: None, count: Any) -> int:
        count._obj.value = 3
        return 0

    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(graphs.ctypes, "CDLL", lambda name: SimpleNamespace(cuGraphGetNodes=count_nodes))
    for name, value in {
        "device_count": lambda: 1, "get_device_capability": lambda index: (9, 0), "get_device_name": lambda index: "model of a GPU",
        "set_device": lambda device: None, "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "stream": on_stream,
        "current_stream": lambda device: model.current, "synchronize": model.wait, "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: model.capturing is not None, "graph_pool_handle": lambda: POOL,
        "memory_reserved": lambda device: model.reserved_bytes,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *about, name=name: model.calls.append(f"{name}{about}"))
    yield model


class Doubling:
    """A forward over an input that stays: y = 2 x, a new y in each call. num_bytes: what the pool must hold for it."""

    def __init__(self, gpu: Gpu, num_bytes: int = 0) -> None:
        self._gpu, self._bytes = gpu, num_bytes
        self.x = torch.zeros(2)
        self.ran_on: list[Stream] = []
        self.results: list[torch.Tensor] = []

    def write(self, *values: float) -> None:
        """The step's inputs, as the core copies them into place: work of the current stream."""
        self._gpu.submit(lambda: self.x.copy_(torch.tensor(values)))

    def __call__(self) -> torch.Tensor:
        self.ran_on.append(self._gpu.current)
        if self._gpu.capturing is not None:
            self._gpu.reserved_bytes = max(self._gpu.reserved_bytes, self._bytes)
        y = torch.full((2,), -1.0)
        self.results.append(y)
        self._gpu.submit(lambda: y.copy_(2 * self.x))
        return y


def test_the_model_has_torch_s_signatures() -> None:
    """Killed by: a release of torch that calls its arguments otherwise."""
    pairs = [(Stream, torch.cuda.Stream), (Event, torch.cuda.Event), (Graph, torch.cuda.CUDAGraph)]
    for ours, theirs in pairs:
        methods = [name for name in vars(ours) if inspect.isfunction(vars(ours)[name]) and name != "reach"]
        for name in methods:
            real = getattr(theirs, "__new__" if name == "__init__" else name)
            named = [list(inspect.signature(method).parameters)[1:] for method in (getattr(ours, name), real)]
            assert named[0] == named[1], f"{theirs.__name__}.{name}"
    real_functions = {"current_stream": ["device"], "stream": ["stream"], "graph_pool_handle": [], "memory_reserved": ["device"],
                      "is_current_stream_capturing": [], "synchronize": ["device"], "empty_cache": []}  # fmt: skip
    for name, parameters in real_functions.items():
        assert list(inspect.signature(getattr(torch.cuda, name)).parameters) == parameters, name


def test_a_copy_arrives_before_it_is_read_and_the_host_goes_on(gpu: Gpu) -> None:
    """The step before still runs when the inputs of the next are asked for. Killed by: a copy on another stream that nobody waits for; a pinned
    place that is the caller's own; a host that waits.
    """
    device, ran = CudaDevice(), []
    gpu.submit(lambda: ran.append("step before"))
    host = torch.tensor([1, 2, 3])
    first = device.to_device(host)
    host.fill_(9)
    second = device.to_device(host)
    assert ran == []
    seen: list[Any] = []
    gpu.submit(lambda: seen.extend([first.tolist(), second.tolist()]))
    gpu.default.synchronize()
    assert ran == ["step before"] and seen == [[1, 2, 3], [9, 9, 9]]


def test_split_sums_are_added_in_float32(gpu: Gpu) -> None:
    """torch lets cuBLAS round their parts to 16 bits. Killed by: a device that leaves it so."""
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    for name in names:
        setattr(torch.backends.cuda.matmul, name, True)
    CudaDevice()
    assert not any(getattr(torch.backends.cuda.matmul, name) for name in names)


def test_what_comes_back_does_not_wait_for_the_next_step(gpu: Gpu) -> None:
    """Killed by: a copy that is read before it is made, one that waits for all that was submitted, or holds what came later."""
    device, ran = CudaDevice(), []
    assert isinstance(device, AsyncDevice)
    tokens = torch.zeros(2, dtype=torch.int64)
    gpu.submit(lambda: tokens.copy_(torch.tensor([3, 4])))
    arrived = device.to_host(tokens)
    gpu.submit(lambda: ran.append("next step"))
    gpu.submit(lambda: tokens.zero_())
    assert arrived().tolist() == [3, 4] and ran == []
    gpu.default.synchronize()
    assert ran == ["next step"] and arrived().tolist() == [3, 4]


def test_to_wait_for_the_device_is_to_wait_for_all_of_it(gpu: Gpu) -> None:
    """Killed by: a synchronize that forgets the stream of the steps."""
    device = CudaDevice()
    there, ran = device.to_device(torch.tensor([5])), []
    gpu.submit(lambda: ran.append(1))
    device.synchronize()
    assert there.tolist() == [5] and ran == [1]


def test_a_graph_is_recorded_and_replayed(gpu: Gpu) -> None:
    """Killed by: no run before (kernels would be compiled in the capture), one that does not wait for the inputs; no first replay, so that the
    step that recorded has no results; a replay on the wrong stream.
    """
    device = CudaDevice()
    assert isinstance(device, GraphDevice)
    forward = Doubling(gpu)
    forward.write(1, 2)
    graph, result = device.capture(forward, 2)
    gpu.default.synchronize()
    assert result.tolist() == [2, 4] and graph.num_ops == 3
    assert forward.results[0].tolist() == [2, 4]
    assert len(forward.ran_on) == 2 and gpu.default not in forward.ran_on and gpu.current is gpu.default
    forward.write(5, 6)
    graph.replay(1)
    assert result.tolist() == [2, 4]
    gpu.default.synchronize()
    assert result.tolist() == [10, 12] and len(forward.ran_on) == 2
    with pytest.raises(ValueError, match="3 rows do not fit a graph of 2"):
        graph.replay(3)


def test_graphs_share_a_pool(gpu: Gpu) -> None:
    """Each says what all of them take so far, so that the largest number is the truth. Killed by: a pool of its own for each graph."""
    device = CudaDevice()
    sizes = [device.capture(Doubling(gpu, num_bytes), 2)[0].arena_bytes for num_bytes in (100, 60, 250)]
    assert sizes == [100, 100, 250]


def test_what_cannot_be_recorded_is_told_and_spoils_nothing(gpu: Gpu) -> None:
    """Killed by: an error that the core does not know, one that names the consequence and not the cause; a stream or the allocator left behind."""
    device = CudaDevice()

    def waits() -> torch.Tensor:
        gpu.wait()
        return torch.zeros(1)

    with pytest.raises(
        NotCapturableError, match=r"RuntimeError: CUDA error: operation not permitted when stream is capturing$"
    ):
        device.capture(waits, 1)
    assert gpu.calls == [f"_cuda_endAllocateToPool(0, {POOL})", f"_cuda_releasePool(0, {POOL})"]

    with pytest.raises(NotCapturableError, match=r"a host tensor of shape \(3,\) is copied to the device"):
        device.capture(lambda: device.to_device(torch.zeros(3)), 1)
    assert len(gpu.calls) == 2 and gpu.capturing is None and gpu.current is gpu.default
    there = device.to_device(torch.tensor([5]))
    device.synchronize()
    assert there.tolist() == [5]


def test_what_fails_anyway_is_no_matter_of_recording(gpu: Gpu) -> None:
    """Killed by: a bug of a model that reads as if it could not be recorded, and is never seen."""

    def breaks() -> torch.Tensor:
        raise ZeroDivisionError("in the model")

    with pytest.raises(ZeroDivisionError):
        CudaDevice().capture(breaks, 1)
    assert gpu.current is gpu.default
