"""What torch does for an NPU already, each by one kernel of CANN: products, table look-ups, copies of blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xllm_core.plugins import DeviceBackend

Prepared = tuple[torch.Tensor, torch.Tensor | None]


class Linear:
    """`linear`. The weight keeps its plain layout; CANN chooses its order of summation by the number of rows."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Prepared:
        """Nothing to lay out."""
        return weight, bias

    def __call__(self, x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        """x: [T, in]. Returns [T, out]."""
        return F.linear(x, *prepared)


class Embedding:
    """`embedding`."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """ids: [T] int64, weight: [V, H]. Returns [T, H]."""
        return weight.index_select(0, ids)


class BlockCopy:
    """`block_copy`: sources are read before any destination is written."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, caches: tuple[torch.Tensor, ...], src: torch.Tensor, dst: torch.Tensor) -> None:
        """caches[i]: [B, S, ...], src and dst: [N] int64 block ids."""
        for cache in caches:
            cache.index_copy_(0, dst, cache.index_select(0, src))
