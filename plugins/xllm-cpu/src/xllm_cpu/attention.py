"""Paged attention over native kernels. What the kernel does, and its limits, stand in `native/attention.cpp`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from xllm_core.plugins import AttentionGeometry, BatchLayout, KVSegments
from xllm_cpu.device import CpuDevice
from xllm_cpu.native import AttentionStep


@dataclass(slots=True)
class Plan:
    """One step, and what its pointers point to. highest_block: in any table. kept: query starts, KV lengths, tables, tasks."""

    step: AttentionStep
    kept: tuple[torch.Tensor, ...]
    num_tokens: int
    highest_block: int


class PagedAttention:
    """A `RaggedGraphKernel` for layout BSGD."""

    def __init__(self, device: CpuDevice, geometry: AttentionGeometry) -> None:
        self._native, self._geometry = device.native, geometry
        self._dtype = torch.bfloat16 if geometry.dtype == "bfloat16" else torch.float32

    def plan(self, batch: BatchLayout) -> Plan:
        """Tasks of the step: so many queries of one row and KV head each. Raises ValueError for lengths or tables that do not fit together."""
        starts, kv_lens, tables = (
            t.to(torch.int32).contiguous() for t in (batch.query_starts, batch.kv_lens, batch.block_tables)
        )
        self._check(starts, kv_lens, tables)
        tasks = torch.empty(self._count_tasks(starts, kv_lens), 3, dtype=torch.int32)
        plan = Plan(self._step(starts, kv_lens, tables, tasks), (starts, kv_lens, tables, tasks), 0, -1)
        self._lay_out(plan, len(kv_lens), tables)
        return plan

    def graph_plan(self, max_rows: int, max_blocks: int) -> Plan:
        """A plan of up to `max_rows` tokens, to be filled by `refill`."""
        shapes = ((max_rows + 1,), (max_rows,), (max_rows, max_blocks), (max_rows * self._geometry.num_kv_heads, 3))
        kept = tuple(torch.zeros(shape, dtype=torch.int32) for shape in shapes)
        return Plan(self._step(*kept), kept, max_rows, -1)

    def refill(self, plan: Plan, batch: BatchLayout) -> None:
        """In place; the batch must fit, with one token a row."""
        if int(batch.query_starts[-1]) != len(batch.kv_lens):
            raise self._unfit(plan, batch)
        self.refill_ragged(plan, batch)

    def refill_ragged(self, plan: Plan, batch: BatchLayout) -> None:
        """In place; the tokens of the batch must fit."""
        starts, kv_lens, tables, _ = plan.kept
        num_rows, width = batch.block_tables.shape
        self._check(batch.query_starts, batch.kv_lens, batch.block_tables)
        if num_rows > len(kv_lens) or width > tables.shape[1] or int(batch.query_starts[-1]) > len(kv_lens):
            raise self._unfit(plan, batch)
        starts[: num_rows + 1] = batch.query_starts
        kv_lens[:num_rows] = batch.kv_lens
        tables[:num_rows, :width] = batch.block_tables
        self._lay_out(plan, num_rows, batch.block_tables)

    def _unfit(self, plan: Plan, batch: BatchLayout) -> ValueError:
        num_rows, width = batch.block_tables.shape
        _, kv_lens, tables, _ = plan.kept
        return ValueError(
            f"{num_rows} rows with {int(batch.query_starts[-1])} tokens and {width} blocks do not fit a graph of {len(kv_lens)} rows"
            f" of one token and {tables.shape[1]} blocks"
        )

    def _check(self, starts: torch.Tensor, kv_lens: torch.Tensor, tables: torch.Tensor) -> None:
        num_rows = len(kv_lens)
        longest = int(kv_lens.max()) if num_rows else 0
        if num_rows and (
            len(starts) != num_rows + 1
            or bool((starts.diff() > kv_lens).any())
            or longest > tables.shape[1] * self._geometry.block_size
        ):
            raise ValueError(
                f"{num_rows} rows of up to {longest} tokens do not fit {len(starts)} starts and"
                f" tables of {tables.shape[1]} blocks of {self._geometry.block_size}"
            )

    def _count_tasks(self, starts: torch.Tensor, kv_lens: torch.Tensor, tasks: torch.Tensor | None = None) -> int:
        """Lay tasks out where room is given, and count them."""
        geometry = self._geometry
        count: int = self._native.attention_tasks(
            starts.data_ptr(), kv_lens.data_ptr(), len(kv_lens), geometry.num_heads, geometry.num_kv_heads,
            None if tasks is None else tasks.data_ptr(),
        )  # fmt: skip
        return count

    def _step(
        self, starts: torch.Tensor, kv_lens: torch.Tensor, tables: torch.Tensor, tasks: torch.Tensor
    ) -> AttentionStep:
        geometry = self._geometry
        return AttentionStep(
            query_starts=starts.data_ptr(), kv_lens=kv_lens.data_ptr(), tables=tables.data_ptr(), tasks=tasks.data_ptr(),
            table_width=tables.shape[1], num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size, block_size=geometry.block_size, window=geometry.sliding_window or 0, scale=geometry.scale,
            soft_cap=geometry.soft_cap or 0.0, is_bf16=int(self._dtype == torch.bfloat16),
        )  # fmt: skip

    def _lay_out(self, plan: Plan, num_rows: int, tables: torch.Tensor) -> None:
        starts, kv_lens, _, tasks = plan.kept
        step = plan.step
        step.num_rows, step.num_tasks = num_rows, self._count_tasks(starts, kv_lens[:num_rows], tasks)
        step.max_kv_len = int(kv_lens[:num_rows].max()) if num_rows else 0
        plan.highest_block = int(tables.max()) if tables.numel() else -1
        if not plan.num_tokens:
            plan.num_tokens = int(starts[num_rows])

    def run(self, q: torch.Tensor, kv: KVSegments, plan: Plan, out: torch.Tensor) -> None:
        """q, out: [T, H, D]; kv.own: (k, v), each [B, S, G, D]. Raises ValueError or IndexError before anything is read that is not there."""
        geometry = self._geometry
        k, v = kv.own
        shape = (plan.num_tokens, geometry.num_heads, geometry.head_size)
        slot = (geometry.block_size, geometry.num_kv_heads, geometry.head_size)
        is_right = q.shape == out.shape == shape and k.shape == v.shape and k.shape[1:] == slot
        if (
            not is_right
            or not {t.dtype for t in (q, k, v, out)} == {self._dtype}
            or not (k.is_contiguous() and v.is_contiguous())
        ):
            raise ValueError(
                f"q {tuple(q.shape)} and k {tuple(k.shape)} must be {shape} and (blocks, *{slot}), contiguous, {self._dtype}"
            )
        if plan.highest_block >= len(k):
            raise IndexError(f"a table names block {plan.highest_block}, the cache has {len(k)}")
        q = q.contiguous()
        target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        self._native.attention(ctypes.addressof(plan.step), q.data_ptr(), k.data_ptr(), v.data_ptr(), target.data_ptr())
        if target is not out:
            out.copy_(target)
