"""What torch does for a GPU already: products by cuBLAS, and table look-ups. No triton here."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xllm_core.plugins import DeviceBackend

Prepared = tuple[torch.Tensor, torch.Tensor | None]


class Linear:
    """`linear` by cuBLAS, which chooses its way of summing by the number of rows: row i is not equal to the bit for every batch."""

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
