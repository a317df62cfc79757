"""Paged attention by npu_fused_infer_attention_score: one call per layer for all rows, prompts, chunks and decode alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch_npu

from xllm_core.plugins import AttentionGeometry, BatchLayout, DeviceBackend, KVSegments

_CAUSAL_FROM_THE_END = 3
"""Sparse mode: query i of a row with n new tokens sees all but the last n - 1 - i keys. The mask is then always this one, of 2048 x 2048."""
_MASK_SIZE = 2048


@dataclass(slots=True)
class Step:
    """One step. ends: behind each row's last query, [R]. kv_lens: [R]. Both are the operator's host arguments. tables: [R, blocks] int32."""

    ends: list[int]
    kv_lens: list[int]
    tables: torch.Tensor


class FusedInferAttention:
    """`AttentionKernel` for layout "BSGD", whose cache [B, S, G, D] the operator reads as [B, S, G * D]."""

    def __init__(self, device: DeviceBackend, geometry: AttentionGeometry) -> None:
        self._device = device
        self._geometry = geometry
        hidden = torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.int8).triu(1)
        self._mask = device.to_device(hidden)

    def plan(self, batch: BatchLayout) -> Step:
        """Lengths stay on the host, where the operator wants them; tables go to the device. No key lies behind a hole: those become block 0."""
        return Step(
            ends=batch.query_starts[1:].tolist(),
            kv_lens=batch.kv_lens.tolist(),
            tables=self._device.to_device(batch.block_tables.clamp(min=0)),
        )

    def run(self, q: torch.Tensor, kv: KVSegments, plan: Step, out: torch.Tensor) -> None:
        """q, out: [T, H, D]; kv.own: (k, v), each [B, S, G, D]."""
        keys, values = (cache.view(*cache.shape[:2], -1) for cache in kv.own)
        geometry = self._geometry
        attended, _ = torch_npu.npu_fused_infer_attention_score(
            q.contiguous(), keys, values,
            atten_mask=self._mask, actual_seq_lengths=plan.ends, actual_seq_lengths_kv=plan.kv_lens, block_table=plan.tables,
            num_heads=geometry.num_heads, num_key_value_heads=geometry.num_kv_heads, scale=geometry.scale, input_layout="TND",
            sparse_mode=_CAUSAL_FROM_THE_END, block_size=geometry.block_size,
        )  # fmt: skip
        out.copy_(attended)
