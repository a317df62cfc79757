"""The device side of the KV cache: tensors per group and layer, and blocks as bytes for stores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.device import DeviceBackend, LazyMemoryDevice
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec, KVTensorSpec
from xllm_core.runtime.dtypes import torch_dtype


def tensor_shape(spec: KVTensorSpec, kind: str, layout: str, num_blocks: int, block_size: int) -> tuple[int, ...]:
    """Shape of one cache tensor. "BSGD": block, slot, then the slot's own shape; "BGSD": the slot's first axis goes before slots."""
    if kind == "recurrent":
        return (num_blocks, *spec.shape)
    if layout == "BSGD":
        return (num_blocks, block_size, *spec.shape)
    if layout == "BGSD":
        return (num_blocks, spec.shape[0], block_size, *spec.shape[1:])
    raise ConfigError(
        f"KV layout {layout!r} is unknown to the core, which allocates BSGD and BGSD; choose a device or kernel that offers one"
    )


def block_bytes(spec: KVGroupSpec, block_size: int) -> int:
    """Bytes of one block of a group over all its layers and tensors."""
    slots = 1 if spec.kind == "recurrent" else block_size
    per_slot = sum(torch_dtype(t.dtype).itemsize * torch.Size(t.shape).numel() for t in spec.tensors)
    return slots * per_slot * len(spec.layers)


class KVCache:
    """All cache tensors of one worker, and the view that KV stores copy through.

    layers: layer index -> its tensors (e.g. (k, v)); the device owns their memory for the life of the worker.
    """

    def __init__(self, device: DeviceBackend, geometry: KVGeometry) -> None:
        self.layers: dict[int, tuple[torch.Tensor, ...]] = {}
        self._groups: list[list[torch.Tensor]] = []
        for spec, num_blocks in zip(geometry.groups, geometry.num_blocks, strict=True):
            flat: list[torch.Tensor] = []
            for layer in spec.layers:
                tensors = tuple(
                    device.allocate(
                        tensor_shape(t, spec.kind, geometry.layout, num_blocks, geometry.block_size),
                        torch_dtype(t.dtype),
                    )
                    for t in spec.tensors
                )
                self.layers[layer] = tensors
                flat.extend(tensors)
            self._groups.append(flat)

    def tensors(self, group: int) -> Sequence[torch.Tensor]:
        """Every tensor of a group, layer by layer; first axis is the block."""
        return self._groups[group]

    def read_block(self, group: int, block_id: int) -> torch.Tensor:
        """A host copy of one block: uint8, [block_bytes]."""
        return torch.cat([t[block_id].contiguous().view(torch.uint8).reshape(-1).cpu() for t in self._groups[group]])

    def write_block(self, group: int, block_id: int, data: torch.Tensor) -> None:
        """Restore what `read_block` returned."""
        at = 0
        for tensor in self._groups[group]:
            target = tensor[block_id]
            size = target.numel() * target.element_size()
            part = data[at : at + size]
            if at % tensor.element_size():  # numbers behind codes may begin at any byte, which no view of them does
                part = part.clone()
            target.copy_(part.view(tensor.dtype).reshape(target.shape))
            at += size


MOST_AHEAD_BYTES = 256 << 20
LEAST_AHEAD_BYTES = 16 << 20
_PIECE_BYTES = 2 << 20


class PagesAhead:
    """Memory of blocks that come next, asked of the system while nothing else is to be done: a step that writes a page first waits for it.

    Blocks are handed out from 0 on, so what was handed out tells what comes next. As much again as was used is got ready, between
    `LEAST_AHEAD_BYTES` and `MOST_AHEAD_BYTES`: an idle server takes little memory that nobody asked for.
    """

    def __init__(self, device: LazyMemoryDevice, cache: KVCache, geometry: KVGeometry) -> None:
        self._device = device
        self._groups = [
            _GroupPages(cache.tensors(i), num_blocks, bytes_of_one)
            for i, (num_blocks, bytes_of_one) in enumerate(zip(geometry.num_blocks, geometry.block_bytes, strict=True))
        ]

    def use(self, group: int, block_ids: Sequence[int]) -> None:
        """These blocks were handed out."""
        pages = self._groups[group]
        pages.num_used = max(pages.num_used, 1 + max(block_ids, default=-1))

    def get_some(self) -> bool:
        """Get a piece, which takes a millisecond at most. False if nothing is left to do for now."""
        part = next((part for pages in self._groups if (part := pages.next_part()) is not None), None)
        if part is not None:
            self._device.populate(part)
        return part is not None


class _GroupPages:
    """num_used: blocks that were handed out, from 0 on. Blocks before `_first` are ready, and those of the piece at hand in some tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor], num_blocks: int, bytes_of_one: int) -> None:
        self.num_used = 0
        self._tensors, self._num_blocks, self._bytes_of_one = tensors, num_blocks, max(1, bytes_of_one)
        largest = max((t[:1].numel() * t.element_size() for t in tensors), default=1)
        self._per_piece = max(1, _PIECE_BYTES // max(1, largest))
        self._first = self._past = 0
        self._rest: list[torch.Tensor] = []

    def next_part(self) -> torch.Tensor | None:
        """Of one tensor, what to get next."""
        if not self._rest:
            self._first = max(self._past, self.num_used)
            self._past = min(self._first + self._per_piece, self._wanted())
            if self._past <= self._first:
                self._past = self._first
                return None
            self._rest = list(self._tensors)
        return self._rest.pop()[self._first : self._past]

    def _wanted(self) -> int:
        """Blocks that should be ready, from 0 on."""
        in_use = self.num_used * self._bytes_of_one
        ahead = min(max(in_use, LEAST_AHEAD_BYTES), MOST_AHEAD_BYTES)
        return min(self._num_blocks, self.num_used + ahead // self._bytes_of_one)
