"""The attention kernel as the core calls it: a plan on the host, launches that take tensors only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from xllm_core.plugins import AttentionGeometry, BatchLayout, DeviceBackend, KVSegments
from xllm_cuda.kernels.attention import attend_tiles, merge_splits
from xllm_cuda.tiling import AttentionTiling, attention_tilings

_LOG2_E = math.log2(math.e)
Ints = npt.NDArray[np.int32]


@dataclass(slots=True)
class Launch:
    """Tiles of one shape. tiles: [N, 8] int32, merges: [M, 4] int32 or None, both on the device, as the kernels read them.

    acc, maxima, sums: partial results of the splits, written and read by every layer in turn.
    """

    tiling: AttentionTiling
    tiles: torch.Tensor
    merges: torch.Tensor | None
    acc: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor


@dataclass(slots=True)
class AttentionPlan:
    """One step: block tables [R, width] int32 on the device, and up to two launches."""

    tables: torch.Tensor
    launches: list[Launch]


class TritonAttention:
    """`AttentionKernel` over layout "BSGD": sliding windows, soft caps, any block size, head sizes up to 256.

    Rows with few queries take narrow tiles with short splits, others wide ones with long splits; which of them follows from the row alone.
    kv_split_tokens: keys in one split of a narrow tile.
    """

    def __init__(self, device: DeviceBackend, geometry: AttentionGeometry, *, kv_split_tokens: int = 512) -> None:
        self._device, self._geometry = device, geometry
        self._group = geometry.num_heads // geometry.num_kv_heads
        self._narrow, self._wide = attention_tilings(
            self._group, geometry.head_size, geometry.dtype, kv_split_tokens=kv_split_tokens
        )
        self._window = geometry.sliding_window or 0
        self._soft_cap = geometry.soft_cap
        self._scale = geometry.scale * (_LOG2_E if geometry.soft_cap is None else 1.0)
        self._nothing = device.allocate((1,), torch.float32)

    def plan(self, batch: BatchLayout) -> AttentionPlan:
        """Cut rows into tiles and keys into splits; as the contract says."""
        query_lens, kv_lens = batch.query_lens.numpy(), batch.kv_lens.numpy()
        starts = batch.query_starts.numpy()
        is_narrow = query_lens <= self._narrow.queries
        launches = [
            self._launch(tiling, np.flatnonzero(chosen), query_lens, kv_lens, starts)
            for tiling, chosen in ((self._narrow, is_narrow & (query_lens > 0)), (self._wide, ~is_narrow))
            if chosen.any()
        ]
        return AttentionPlan(self._device.to_device(batch.block_tables.contiguous()), launches)

    def run(self, q: torch.Tensor, kv: KVSegments, plan: AttentionPlan, out: torch.Tensor) -> None:
        """q, out: [T, H, D]; kv.own: (k, v), each [B, S, G, D]."""
        k, v = kv.own
        geometry = self._geometry
        for launch in plan.launches:
            tiling, sizes = launch.tiling, (self._group, geometry.head_size)
            attend_tiles[(len(launch.tiles), geometry.num_kv_heads)](
                q, k, v, out, launch.tiles, plan.tables, launch.acc, launch.maxima, launch.sums, self._scale, self._soft_cap or 1.0,
                q.stride(0), q.stride(1), out.stride(0), out.stride(1), k.stride(0), k.stride(1), k.stride(2), plan.tables.stride(0),
                *sizes, geometry.block_size, self._window, self._soft_cap is not None,
                tiling.block_m, tiling.block_n, tiling.block_d, tiling.split, tiling.precision,
                num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            )  # fmt: skip
            if launch.merges is not None:
                merge_splits[(len(launch.merges), geometry.num_kv_heads)](
                    out, launch.merges, launch.acc, launch.maxima, launch.sums, out.stride(0), out.stride(1),
                    *sizes, tiling.block_m, tiling.block_d, num_warps=tiling.num_warps,
                )  # fmt: skip

    def _launch(self, tiling: AttentionTiling, rows: Ints, query_lens: Ints, kv_lens: Ints, starts: Ints) -> Launch:
        """The tiles of some rows, and where their splits meet. All at once in numpy: thousands of tiles take no longer than a few."""
        counts = -(-query_lens[rows] // tiling.queries)
        row = np.repeat(rows, counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        done = within * tiling.queries
        num_queries = np.minimum(query_lens[row] - done, tiling.queries)
        position = kv_lens[row] - query_lens[row] + done
        first_key = np.maximum(position - self._window + 1, 0) if self._window else np.zeros_like(position)
        num_keys = position + num_queries  # causal: nobody in the tile sees further
        first_split = first_key // tiling.split
        num_splits = (num_keys - 1) // tiling.split - first_split + 1
        is_split = num_splits > 1
        places = np.where(is_split, num_splits, 0)
        first_place = np.cumsum(places) - places

        tile = np.repeat(np.arange(len(row)), num_splits)
        nth = np.arange(len(tile)) - np.repeat(np.cumsum(num_splits) - num_splits, num_splits)
        place = np.where(is_split[tile], first_place[tile] + nth, -1)
        token = starts[row] + done
        columns = (
            row[tile], token[tile], position[tile], num_queries[tile], first_split[tile] + nth, first_key[tile], num_keys[tile], place,
        )  # fmt: skip
        merged = np.flatnonzero(is_split)
        merges = np.stack([token[merged], num_queries[merged], first_place[merged], num_splits[merged]], axis=1)
        shape = (max(1, int(places.sum())), self._geometry.num_kv_heads, tiling.block_m)
        new = self._nothing.new_empty
        has_merges = len(merged) > 0
        return Launch(
            tiling,
            self._on_device(np.stack(columns, axis=1)),
            self._on_device(merges) if has_merges else None,
            new((*shape, tiling.block_d)) if has_merges else self._nothing,
            new(shape) if has_merges else self._nothing,
            new(shape) if has_merges else self._nothing,
        )

    def _on_device(self, table: npt.NDArray[np.signedinteger]) -> torch.Tensor:
        return self._device.to_device(torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32)))
