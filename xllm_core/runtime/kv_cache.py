"""The device side of the KV cache: tensors per group and layer, and blocks as bytes for stores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.device import DeviceBackend
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
            target.copy_(data[at : at + size].view(tensor.dtype).reshape(target.shape))
            at += size
