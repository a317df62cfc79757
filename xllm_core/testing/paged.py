"""Ragged batches over a paged cache, for attention kernels: made on the host, laid out for a kernel, and answered by the reference.

Slots that no query may see hold a large number: a kernel that looks at one of them answers something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from xllm_core.plugins.contracts.attention import AttentionGeometry, AttentionKernel, BatchLayout, KVSegments
from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.kv import KVTensorSpec
from xllm_core.reference.attention import ReferenceAttention
from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.quantization import int8_entries
from xllm_core.runtime.dtypes import torch_dtype
from xllm_core.runtime.kv_cache import tensor_shape

POISON = 1.0e4

Rows = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """R rows of (new tokens, tokens in all). q: [T, H, D]; k, v: [B, S, G, D]; all float32 on the host, rounded to the geometry's dtype."""

    geometry: AttentionGeometry
    rows: tuple[tuple[int, int], ...]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor

    def pick(self, rows: Sequence[int]) -> PagedBatch:
        """Only these rows, in this order, over the same cache."""
        starts = self.layout().query_starts.tolist()
        q = torch.cat([self.q[starts[row] : starts[row + 1]] for row in rows])
        return replace(self, rows=tuple(self.rows[row] for row in rows), q=q, tables=self.tables[list(rows)])

    def caches(self) -> tuple[torch.Tensor, ...]:
        """What a kernel gets as `KVSegments.own`, in layout "BSGD", on the host."""
        if self.geometry.kv_dtype is None:
            return tuple(cache.to(torch_dtype(self.geometry.dtype)) for cache in (self.k, self.v))
        (k, k_steps), (v, v_steps) = int8_entries(self.k), int8_entries(self.v)
        return k, v, k_steps, v_steps

    def layout(self) -> BatchLayout:
        """As the runner gives it to `plan`: on the host."""
        query_lens = torch.tensor([row[0] for row in self.rows], dtype=torch.int32)
        kv_lens = torch.tensor([row[1] for row in self.rows], dtype=torch.int32)
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), query_lens.cumsum(0).to(torch.int32)))
        width = -(-int(kv_lens.max()) // self.geometry.block_size)
        return BatchLayout(query_lens, kv_lens, starts, self.tables[:, :width].contiguous())


def make_batch(geometry: AttentionGeometry, rows: Rows, *, seed: int = 0) -> PagedBatch:
    """Random queries and cache; blocks lie scrambled, and those that left the window are holes in the table."""
    generator = torch.Generator().manual_seed(seed)
    size, window, dtype = geometry.block_size, geometry.sliding_window, torch_dtype(geometry.dtype)
    blocks = [-(-kv_len // size) for _, kv_len in rows]
    order = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
    shape = (len(order), size, geometry.num_kv_heads, geometry.head_size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).float()

    caches = [torch.full(shape, POISON), torch.full(shape, POISON)]
    tables = torch.full((len(rows), max(blocks)), -1, dtype=torch.int32)
    for row, (num_queries, kv_len) in enumerate(rows):
        own = torch.tensor([order.pop() for _ in range(blocks[row])])
        first = 0 if window is None else max(0, kv_len - num_queries - window + 1)
        positions = torch.arange(first, kv_len)
        for cache in caches:
            cache[own[positions // size], positions % size] = random(len(positions), *shape[2:])
        tables[row, first // size : blocks[row]] = own[first // size :].int()
    total = sum(num_queries for num_queries, _ in rows)
    return PagedBatch(
        geometry, tuple(rows), random(total, geometry.num_heads, geometry.head_size), caches[0], caches[1], tables
    )


def edge_rows(block_size: int) -> Rows:
    """Decode, whole prompts and chunks together, with lengths just before, at and behind the edges of blocks."""
    size = block_size
    lengths = sorted({1, 2, max(1, size - 1), size, size + 1, 2 * size, 3 * size - 1, 4 * size + 1})
    decode = [(1, length) for length in lengths]
    whole = [(length, length) for length in (2, size, size + 1)]
    chunks = [(min(length, 3), length) for length in (size + 1, 2 * size + 1)] + [
        (size, 2 * size),
        (size + 1, 3 * size),
    ]
    mixed = [row for three in zip(decode, whole + chunks, strict=False) for row in three]
    return [*mixed, (1, 5 * size)]


def laid_out(cache: torch.Tensor, layout: str, device: DeviceBackend) -> torch.Tensor:
    """A cache [B, S, G, ...] on a device, in a KV layout. Raises ConfigError for a layout that the core does not allocate."""
    num_blocks, size, *slot = cache.shape
    shape = tensor_shape(KVTensorSpec("kv", tuple(slot), "float32"), "full", layout, num_blocks, size)
    target = device.allocate(shape, cache.dtype)
    host = cache if layout == "BSGD" else cache.transpose(1, 2)
    target.copy_(device.to_device(host.contiguous()))
    return target


def attend(
    kernel: AttentionKernel, device: DeviceBackend, batch: PagedBatch, *, num_layers: int = 1, plan: Any = None, room: int = 0
) -> torch.Tensor:  # fmt: skip
    """What a kernel says: [T, H, D] float32 on the host. It must write all of `out` and change nothing else, layer after layer.

    plan: made before, for `room` tokens, those behind the batch's being padding; by itself a new one.
    """
    dtype = torch_dtype(batch.geometry.dtype)
    caches = tuple(laid_out(cache, batch.geometry.layout, device) for cache in batch.caches())
    padding = (0, 0, 0, 0, 0, max(0, room - len(batch.q)))
    q = device.to_device(torch.nn.functional.pad(batch.q, padding).to(dtype))
    before = [tensor.clone() for tensor in (q, *caches)]
    with torch.inference_mode():
        plan = plan if plan is not None else kernel.plan(batch.layout())
        answers = []
        for _ in range(num_layers):
            out = torch.full_like(q, float("nan"))
            kernel.run(q, KVSegments(own=caches), plan, out)
            device.synchronize()
            answers.append(out[: len(batch.q)].float().cpu())
    assert all(torch.equal(a, b) for a, b in zip(before, (q, *caches), strict=True)), "it changed q or the cache"
    assert all(torch.equal(answer, answers[0]) for answer in answers), "a plan used twice answers differently"
    return answers[0]


def expected(batch: PagedBatch) -> torch.Tensor:
    """The reference's answer in float32, from the same rounded numbers."""
    geometry = replace(batch.geometry, dtype="float32", layout="BSGD")
    device = ReferenceDevice(0)
    return attend(ReferenceAttention(device, geometry), device, replace(batch, geometry=geometry))
