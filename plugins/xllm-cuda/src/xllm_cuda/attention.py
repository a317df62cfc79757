"""The attention kernel as the core calls it: a plan on the host, launches that take tensors only.

Plans of recorded steps stay where they are. Their launches have the grid of the largest step, so the number of tiles is read from the device;
their partial results lie wherever the kernel object has room for those of this step, which is also read there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xllm_core.plugins import AttentionGeometry, BatchLayout, DeviceBackend, KVSegments
from xllm_cuda.kernels.attention import attend_in_place, attend_tiles, merge_in_place, merge_splits
from xllm_cuda.tiling import GRAPH_PROGRAMS, AttentionTiling, attention_tilings, next_power_of_2

_LOG2_E = math.log2(math.e)
_HEADER, _MERGE_FIELDS, _TILE_FIELDS = 8, 4, 8
"""int32 each: the header of a plan in place, an entry of its merges, of its tiles."""
_PADDING_ROW, _PADDING = np.array([1, 1, 0, 0, 0, 0, 0, 0]), np.array([0, 0, 0, 1, 0, 0, 0, -1])
"""A tile of padding: what is counted by its row, and what all have: one query, no keys, and its answer right in its place."""
Ints = npt.NDArray[np.int32]
_NO_TABLES, _NO_MERGES = np.zeros((0, 0), dtype=np.int32), np.zeros((0, _MERGE_FIELDS), dtype=np.int32)


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


@dataclass(slots=True)
class PlanInPlace:
    """Any step of up to R rows of one token. tables: [R, max blocks] int32 on the device. ints: int32 on the device, of which the rest are views.

    header: [4] int64, tiles: [N, 8], merges: [R, 4], as the kernels read them; N is what the longest rows need. seen: what the first rows of
    `tables` are, on the host.
    """

    tables: torch.Tensor
    ints: torch.Tensor
    header: torch.Tensor
    merges: torch.Tensor
    tiles: torch.Tensor
    max_splits: int
    seen: Ints


def _of_one_token(rows: Ints, kv_lens: Ints) -> Ints:
    """Tiles of a step in which every row is one token and sees the keys of one split: as `_lay_out` makes them, and sooner."""
    tiles = np.zeros((len(rows), _TILE_FIELDS), dtype=np.int32)
    tiles[:, 0] = tiles[:, 1] = rows
    tiles[:, 2] = kv_lens - 1
    tiles[:, 3] = 1
    tiles[:, 6] = kv_lens
    tiles[:, 7] = -1
    return tiles


class TritonAttention:
    """`GraphKernel` over layout "BSGD": sliding windows, soft caps, any block size, head sizes up to 256.

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
        self._scratch = (self._nothing, self._nothing, self._nothing)
        self._num_places = 0

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

    def graph_plan(self, max_rows: int, max_blocks: int) -> PlanInPlace:
        """Room for the tiles of the longest rows, and no partial results yet."""
        num_keys, split = max_blocks * self._geometry.block_size, self._narrow.split
        seen = min(num_keys, self._window) if self._window else num_keys
        # Keys that begin anywhere in a split touch one more than fits, keys from the first on do not.
        max_splits = min(-(-num_keys // split), (seen + split - 2) // split + 1)
        tiles_at = _HEADER + _MERGE_FIELDS * max_rows
        ints = self._device.allocate((tiles_at + _TILE_FIELDS * max_rows * max_splits,), torch.int32)
        return PlanInPlace(
            self._device.allocate((max_rows, max_blocks), torch.int32), ints, ints[:_HEADER].view(torch.int64),
            ints[_HEADER:tiles_at].view(max_rows, _MERGE_FIELDS), ints[tiles_at:].view(-1, _TILE_FIELDS), max_splits, _NO_TABLES,
        )  # fmt: skip

    def refill(self, plan: PlanInPlace, batch: BatchLayout) -> None:
        """One copy to the device and one on it, and the same again where block tables have changed, in the order of the steps.

        Raises ValueError for a step that does not fit.
        """
        query_lens, kv_lens, starts = batch.query_lens.numpy(), batch.kv_lens.numpy(), batch.query_starts.numpy()
        num_rows, width = batch.block_tables.shape
        max_rows, max_blocks = plan.tables.shape
        longest = int(kv_lens.max(initial=0))
        if (
            num_rows > max_rows
            or width > max_blocks
            or longest > width * self._geometry.block_size
            or (query_lens != 1).any()
        ):
            raise ValueError(
                f"{num_rows} rows of up to {longest} tokens, {int(starts[-1])} of them new, in {width} blocks do not fit a graph of {max_rows} rows"
                f" of one new token and {max_blocks} blocks of {self._geometry.block_size}"
            )
        tiles, merges, num_places = self._lay_out(self._narrow, np.arange(num_rows), query_lens, kv_lens, starts)
        self._make_room(num_places)
        # Padding: a token with no keys, whose answer is zero. What was in its place before might be anything.
        padding = np.arange(num_rows, max_rows)[:, None]
        tiles = np.concatenate([tiles, padding * _PADDING_ROW + _PADDING], dtype=np.int32)
        tiles_at = _HEADER + _MERGE_FIELDS * max_rows
        ints = np.zeros(tiles_at + tiles.size, dtype=np.int32)
        ints[:_HEADER].view(np.int64)[:] = len(tiles), *(tensor.data_ptr() for tensor in self._scratch)
        ints[_HEADER : _HEADER + merges.size] = merges.ravel()
        ints[tiles_at:] = tiles.ravel()
        plan.ints[: len(ints)].copy_(self._on_device(ints))
        tables = batch.block_tables.numpy()
        if not np.array_equal(tables, plan.seen):
            plan.seen = tables.copy()  # the caller goes on writing to its own
            plan.tables[:num_rows, :width].copy_(self._device.to_device(batch.block_tables.contiguous()))

    def run(self, q: torch.Tensor, kv: KVSegments, plan: AttentionPlan | PlanInPlace, out: torch.Tensor) -> None:
        """q, out: [T, H, D]; kv.own: (k, v), each [B, S, G, D]."""
        k, v = kv.own
        if isinstance(plan, PlanInPlace):
            self._run_in_place(q, k, v, plan, out)
            return
        num_kv_heads, sizes = self._geometry.num_kv_heads, (self._group, self._geometry.head_size)
        for launch in plan.launches:
            tiling = launch.tiling
            attend_tiles[(len(launch.tiles), num_kv_heads)](
                q, k, v, out, launch.tiles, plan.tables, launch.acc, launch.maxima, launch.sums,
                *self._arguments(q, k, out, plan.tables, tiling), num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            )  # fmt: skip
            if launch.merges is not None:
                merge_splits[(len(launch.merges), num_kv_heads)](
                    out, launch.merges, launch.acc, launch.maxima, launch.sums, out.stride(0), out.stride(1),
                    *sizes, tiling.block_m, tiling.block_d, num_warps=tiling.num_warps,
                )  # fmt: skip

    def _run_in_place(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PlanInPlace, out: torch.Tensor
    ) -> None:
        tiling, num_kv_heads = self._narrow, self._geometry.num_kv_heads
        num_programs = min(len(plan.tiles), max(1, GRAPH_PROGRAMS // num_kv_heads))
        attend_in_place[(num_programs, num_kv_heads)](
            q, k, v, out, plan.header, plan.tiles, plan.tables,
            *self._arguments(q, k, out, plan.tables, tiling), num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
        if plan.max_splits > 1:
            merge_in_place[(len(plan.merges), num_kv_heads)](
                out, plan.header, plan.merges, out.stride(0), out.stride(1), self._group, self._geometry.head_size,
                tiling.block_m, tiling.block_d, num_warps=tiling.num_warps,
            )  # fmt: skip

    def _arguments(
        self, q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, tables: torch.Tensor, tiling: AttentionTiling
    ) -> tuple[Any, ...]:
        """What both launches of tiles end with: numbers, and constants of the compiler."""
        geometry = self._geometry
        return (
            self._scale, self._soft_cap or 1.0,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), k.stride(0), k.stride(1), k.stride(2), tables.stride(0),
            self._group, geometry.head_size, geometry.block_size, self._window, self._soft_cap is not None,
            tiling.block_m, tiling.block_n, tiling.block_d, tiling.split, tiling.precision,
        )  # fmt: skip

    def _make_room(self, num_places: int) -> None:
        """For the partial results of a step in place. What there was is given back, which is in the order of the steps too."""
        if num_places > self._num_places:
            self._num_places = next_power_of_2(num_places)
            shape = (self._num_places, self._geometry.num_kv_heads, self._narrow.block_m)
            new = self._nothing.new_empty
            self._scratch = (self._nothing,) * 3  # so that the old and the new are not held at once
            self._scratch = new((*shape, self._narrow.block_d)), new(shape), new(shape)

    def _launch(self, tiling: AttentionTiling, rows: Ints, query_lens: Ints, kv_lens: Ints, starts: Ints) -> Launch:
        """The tiles of some rows on the device, with room for their partial results."""
        tiles, merges, num_places = self._lay_out(tiling, rows, query_lens, kv_lens, starts)
        has_merges = num_places > 0
        shape = (num_places, self._geometry.num_kv_heads, tiling.block_m)
        new = self._nothing.new_empty
        return Launch(
            tiling,
            self._on_device(tiles),
            self._on_device(merges) if has_merges else None,
            new((*shape, tiling.block_d)) if has_merges else self._nothing,
            new(shape) if has_merges else self._nothing,
            new(shape) if has_merges else self._nothing,
        )

    def _lay_out(
        self, tiling: AttentionTiling, rows: Ints, query_lens: Ints, kv_lens: Ints, starts: Ints
    ) -> tuple[Ints, Ints, int]:
        """(tiles, where their splits meet, partial results), as the kernels read them. All at once in numpy: thousands of tiles take no longer
        than a few.
        """
        counts = -(-query_lens[rows] // tiling.queries)
        if len(rows) == len(starts) - 1 == starts[-1] and not self._window and kv_lens.max(initial=0) <= tiling.split:
            return _of_one_token(rows, kv_lens), _NO_MERGES, 0
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
        return np.stack(columns, axis=1).astype(np.int32), merges.astype(np.int32), int(places.sum())

    def _on_device(self, table: Ints) -> torch.Tensor:
        return self._device.to_device(torch.from_numpy(np.ascontiguousarray(table)))
