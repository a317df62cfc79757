"""A device made to break assumptions: CPU memory, but blocks of 24 tokens only, heads before slots in the cache, no graphs, no bfloat16, and
`torch.cuda` booby-trapped while it is in use. What runs here runs on a device that nobody has seen yet.

Its ops are the reference's where the layout of the cache does not matter. A plugin that offers it is in the core's own tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.device import DeviceBackend, DeviceFacts
from xllm_core.reference.attention import ReferenceAttention
from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.ops import RopeKvWrite

KIND = "hostile"
BLOCK_SIZE = 24
LAYOUT = "BGSD"
# Who may look at torch.cuda: torch itself, and libraries that ask it whether there is one.
_MAY_LOOK = ("torch", "transformers", "accelerate", "safetensors", "importlib", "inspect", "pytest", "_pytest")


class HostileDevice(ReferenceDevice):
    """`contracts.device.DeviceBackend`. Building one arms the trap for the rest of the process, or until `disarm_cuda`."""

    def __init__(self, index: int = 0) -> None:
        if index != 0:
            raise ConfigError(f"[device] index = {index}: there is one hostile device, index 0")
        super().__init__(0)
        arm_cuda()

    def facts(self) -> DeviceFacts:
        """Everything that a careless core would take for granted is otherwise."""
        return replace(
            super().facts(), kind=KIND, name="hostile reference", dtypes=("float32",), block_sizes=(BLOCK_SIZE,), kv_layouts=(LAYOUT,)
        )  # fmt: skip


class HostileAttention(ReferenceAttention):
    """Paged attention over [B, G, S, D]."""

    def _gather(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        size = cache.shape[2]
        return cache[slots // size, :, slots % size]


class HostileKvWrite:
    """`kv_write` into [B, G, S, D]."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, new: tuple[torch.Tensor, ...], caches: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
        """new[i]: [T, G, D], caches[i]: [B, G, S, D], slots: [T] int64 counted over B * S; -1 is skipped."""
        kept = slots >= 0
        for tensor, cache in zip(new, caches, strict=True):
            size = cache.shape[2]
            cache[slots[kept] // size, :, slots[kept] % size] = tensor[kept].to(cache.dtype)


class HostileRopeKvWrite(RopeKvWrite):
    """The fusion `rope_kv_write` into [B, G, S, D]."""

    def __init__(self, device: DeviceBackend) -> None:
        super().__init__(device)
        self._write = HostileKvWrite(device)  # type: ignore[assignment]


class _Trap(ModuleType):
    """`torch.cuda` for everybody but torch: looking at it is an error that names who looked."""

    def __getattribute__(self, name: str) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if name.startswith("__") or caller.partition(".")[0] in _MAY_LOOK:
            return super().__getattribute__(name)
        raise AssertionError(
            f"{caller} looked at torch.cuda.{name}; nothing outside a device's own plugin may know that device"
        )


def arm_cuda() -> None:
    """Set the trap."""
    torch.cuda.__class__ = _Trap


def disarm_cuda() -> None:
    """Take it away."""
    torch.cuda.__class__ = ModuleType


@contextmanager
def hostile_cuda() -> Iterator[None]:
    """The trap, for a while."""
    arm_cuda()
    try:
        yield
    finally:
        disarm_cuda()
