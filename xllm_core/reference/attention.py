"""Paged attention in plain PyTorch: gather a row's keys and values, attend, done.

All index work is done once per step in `plan`; `run`, called once per layer, only gathers and multiplies. Rows with one new token
(decode) of similar length are padded to one another and attended together; a row with several new tokens goes alone.
Padding repeats the row's own last slot and is masked, so that no memory of somebody else is ever read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from xllm_core.plugins.contracts.attention import AttentionGeometry, BatchLayout, KVSegments

if TYPE_CHECKING:
    from xllm_core.plugins.contracts.device import DeviceBackend

# Gathered tokens per call: bounds the copy of keys and values, whatever the batch.
_MAX_GATHERED = 65536


@dataclass(slots=True)
class RowGroup:
    """Rows attended in one call: R rows of `num_queries` new tokens each (R > 1 only for one new token).

    tokens: [R] int64 into the step's tokens, or a slice of them. slots: [R * num_keys] int32, counted over
    B * S. visible: what each query may see, broadcast to [R, G, queries, num_keys]; None when all is visible or causality alone decides.
    """

    tokens: torch.Tensor | slice
    num_rows: int
    num_queries: int
    num_keys: int
    slots: torch.Tensor
    visible: torch.Tensor | None
    is_causal: bool


class ReferenceAttention:
    """`contracts.attention.AttentionKernel` for layout "BSGD"; knows sliding windows, soft caps and 8 bits."""

    def __init__(self, device: DeviceBackend, geometry: AttentionGeometry) -> None:
        self._geometry = geometry
        self._group_size = geometry.num_heads // geometry.num_kv_heads

    def plan(self, batch: BatchLayout) -> list[RowGroup]:
        """Find every row's slots and masks; batch as the contract says."""
        query_lens, kv_lens = batch.query_lens.numpy(), batch.kv_lens.numpy()
        starts, tables = batch.query_starts.numpy(), batch.block_tables.numpy()
        groups = [
            self._plan_prefill(int(starts[row]), int(query_lens[row]), int(kv_lens[row]), tables[row])
            for row in np.flatnonzero(query_lens > 1).tolist()
        ]
        rows = np.flatnonzero(query_lens == 1)
        seen = self._num_seen(kv_lens[rows])
        similar = np.frexp(seen.astype(np.float64))[1]  # lengths between two powers of two go together
        for bucket in sorted(set(similar.tolist())):
            members = rows[similar == bucket]
            width = max(1, _MAX_GATHERED // (1 << bucket))
            for first in range(0, len(members), width):
                part = members[first : first + width]
                groups.append(self._plan_decode(starts[part], kv_lens[part], tables[part]))
        return groups

    def run(self, q: torch.Tensor, kv: KVSegments, plan: list[RowGroup], out: torch.Tensor) -> None:
        """q, out: [T, H, D]; kv.own: (k, v), each [B, S, G, D], and in 8 bits their steps, each [B, S, G]."""
        num_kv_heads, head_size = self._geometry.num_kv_heads, self._geometry.head_size
        for group in plan:
            shape = (group.num_rows, group.num_keys, num_kv_heads, head_size)
            k, v = (tensor.view(shape).transpose(1, 2) for tensor in self._read(kv.own, group.slots, q.dtype))
            grouped = q[group.tokens].view(-1, num_kv_heads, self._group_size, head_size)
            if group.num_queries == 1:
                # The heads that share keys become query positions: [R, G, heads per group, D].
                out[group.tokens] = self._attend(grouped, k, v, group).reshape(group.num_rows, -1, head_size)
            else:
                # The heads that share keys become a batch: [heads per group, G, queries, D].
                k, v = (tensor.expand(self._group_size, -1, -1, -1) for tensor in (k, v))
                attended = self._attend(grouped.permute(2, 1, 0, 3), k, v, group)
                out[group.tokens] = attended.permute(2, 1, 0, 3).reshape(group.num_queries, -1, head_size)

    def _read(
        self, caches: tuple[torch.Tensor, ...], slots: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in these slots, [N, ...]."""
        k, v, *steps = (self._gather(cache, slots) for cache in caches)
        if steps:
            k, v = ((codes * by.unsqueeze(-1)).to(dtype) for codes, by in zip((k, v), steps, strict=True))
        return k, v

    def _gather(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """What lies in these slots: [N, ...]. The only place that knows the layout."""
        return cache.flatten(0, 1).index_select(0, slots)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: RowGroup) -> torch.Tensor:
        scale, soft_cap = self._geometry.scale, self._geometry.soft_cap
        if soft_cap is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=group.visible, is_causal=group.is_causal, scale=scale
            )
        scores = soft_cap * torch.tanh(torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale / soft_cap)
        visible = group.visible
        if group.is_causal:
            visible = torch.ones(group.num_queries, group.num_keys, dtype=torch.bool).tril()
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        return torch.matmul(scores.softmax(-1), v.float()).to(q.dtype)

    def _num_seen(self, kv_lens: np.ndarray) -> np.ndarray:
        """Keys that the last query of each row sees."""
        window = self._geometry.sliding_window
        return kv_lens if window is None else np.minimum(kv_lens, window)

    def _plan_decode(self, tokens: np.ndarray, kv_lens: np.ndarray, tables: np.ndarray) -> RowGroup:
        lens = self._num_seen(kv_lens)
        width = int(lens.max())
        if self._geometry.sliding_window is None:
            num_blocks = -(-width // self._geometry.block_size)
            firsts = tables[:, :num_blocks, None].astype(np.int32) * self._geometry.block_size
            slots = (firsts + np.arange(self._geometry.block_size, dtype=np.int32)).reshape(len(lens), -1)[:, :width]
        else:
            slots = self._slots(tables, np.minimum((kv_lens - lens)[:, None] + np.arange(width), kv_lens[:, None] - 1))
        visible = None
        if (lens < width).any():
            # Shorter rows repeat their last slot to the right; the mask hides the copies.
            is_own = np.arange(width) < lens[:, None]
            slots = np.where(is_own, slots, np.take_along_axis(slots, lens[:, None] - 1, axis=1))
            visible = torch.from_numpy(is_own)[:, None, None, :]
        first, count = int(tokens[0]), len(tokens)
        is_run = int(tokens[-1]) - first == count - 1  # rows come in order
        return RowGroup(
            tokens=slice(first, first + count) if is_run else torch.from_numpy(tokens.astype(np.int64)),
            num_rows=count, num_queries=1, num_keys=width,
            slots=torch.from_numpy(slots.reshape(-1)), visible=visible, is_causal=False,
        )  # fmt: skip

    def _plan_prefill(self, start: int, num_queries: int, num_keys: int, table: np.ndarray) -> RowGroup:
        window = self._geometry.sliding_window
        first_query = num_keys - num_queries
        first_key = 0 if window is None else max(0, first_query - window + 1)
        positions = np.arange(first_key, num_keys)
        is_causal = first_query == first_key == 0 and (window is None or window >= num_keys)
        visible = None
        if not is_causal:
            distance = np.arange(first_query, num_keys)[:, None] - positions
            visible = torch.from_numpy((distance >= 0) & (distance < (window or num_keys)))
        return RowGroup(
            tokens=slice(start, start + num_queries), num_rows=1, num_queries=num_queries, num_keys=len(positions),
            slots=torch.from_numpy(self._slots(table[None], positions[None])[0]), visible=visible, is_causal=is_causal,
        )  # fmt: skip

    def _slots(self, tables: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Flat slots of positions [R, K], by each row's block table [R, max_blocks]; int32."""
        size = self._geometry.block_size
        blocks = tables[np.arange(len(tables))[:, None], positions // size]
        slots: np.ndarray = (blocks * size + positions % size).astype(np.int32)
        return slots
