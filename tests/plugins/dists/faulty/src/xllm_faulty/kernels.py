"""Attention with a fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from xllm_core.plugins import AttentionGeometry, BatchLayout, DeviceBackend, KVSegments
from xllm_core.reference.attention import ReferenceAttention


class IgnoresWindow(ReferenceAttention):
    """Declares a window and sees everything. Holes of the table are read as block 0."""

    def __init__(self, device: DeviceBackend, geometry: AttentionGeometry) -> None:
        super().__init__(device, replace(geometry, sliding_window=None))

    def plan(self, batch: BatchLayout) -> Any:
        return super().plan(replace(batch, block_tables=batch.block_tables.clamp(min=0)))


class OffByOne(ReferenceAttention):
    """A row whose length is a whole number of blocks loses its last token."""

    def plan(self, batch: BatchLayout) -> Any:
        size = self._geometry.block_size
        at_edge = (batch.kv_lens % size == 0) & (batch.query_lens == 1) & (batch.kv_lens > 1)
        return super().plan(replace(batch, kv_lens=batch.kv_lens - at_edge.int()))


class FeelsRows(ReferenceAttention):
    """Right up to rounding, and rounded differently when there are many rows."""

    def run(self, q: torch.Tensor, kv: KVSegments, plan: Any, out: torch.Tensor) -> None:
        super().run(q, kv, plan, out)
        if len(q) > 64:
            out.copy_((out * 3.0) / 3.0)
