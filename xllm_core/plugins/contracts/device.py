"""A device backend: facts, memory, and where tensors live. Built once per worker; facts are read once, at assembly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the core obeys. Open strings, never enumerations.

    kind: the name specs list in `devices` ("reference", "cpu", "cuda", "npu"). torch_device: where tensors are made ("cpu", "cuda:0").
    name: for people. dtypes: supported model dtypes, best first. block_sizes: KV block sizes in tokens, best first; empty means any.
    kv_layouts: best first. is_row_invariant: row i of every op is bit-equal whatever the other rows are.
    """

    kind: str
    name: str
    torch_device: str
    dtypes: tuple[str, ...]
    block_sizes: tuple[int, ...] = ()
    kv_layouts: tuple[str, ...] = ("BSGD",)
    is_row_invariant: bool = False
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes of device memory: all of it, and what could be allocated now."""

    total_bytes: int
    free_bytes: int


class DeviceBackend(Protocol):
    """One device of one worker."""

    def facts(self) -> DeviceFacts:
        """Unchanging facts; callable before any other method."""

    def memory(self) -> MemoryInfo:
        """Device memory now."""

    def peak_memory_bytes(self) -> int:
        """Highest use since start, as far as the device can tell (a CPU tells the process's resident peak)."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor for the life of the worker (weights, KV); raises MemoryError with both sizes when it cannot."""

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor in host memory that copies to the device fast (pinned where that exists); its numpy view is written each step."""

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor to the device, ordered before later work of the step; may alias `host` where memory is one."""

    def synchronize(self) -> None:
        """Wait until the work submitted so far is done."""

    def num_threads(self) -> int:
        """Host threads that the device's own work uses."""

    def set_num_threads(self, count: int) -> None:
        """What `[device] num_threads` asks for, before anything runs; raises ConfigError where the device has no say in it."""


@runtime_checkable
class LazyMemoryDevice(DeviceBackend, Protocol):
    """A `DeviceBackend` whose allocations get their pages when they are first written, which then takes longer than the writing."""

    def populate(self, tensor: torch.Tensor) -> None:
        """Get those of a contiguous part of an allocation now. What it holds stays."""


@runtime_checkable
class AsyncDevice(DeviceBackend, Protocol):
    """A `DeviceBackend` that computes while the host goes on, so that a step can be launched before the tokens of the one before are known.

    Its `to_device` has taken the host's values when it returns, and aliases nothing: the next step is written over them at once. What other threads
    ask of its tensors, as movers of KV do, comes behind what the worker has submitted by then.
    """

    def to_host(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor to the host, as earlier work of the step leaves it. The call of what is returned waits for the copy, on whatever
        thread, and not for work that was submitted later; it raises what the device's work raised.
        """
