"""Paged attention over native kernels. What the kernel does, and its limits, stand in `native/attention_worker.h`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from xllm_core.plugins import AttentionGeometry, BatchLayout, ConfigError, KVSegments
from xllm_cpu.device import CpuDevice
from xllm_cpu.native import AttentionStep

MOST_INT8_HEAD = 512  # elements whose products with 16-bit queries fit 32 bits in any case


@dataclass(slots=True)
class Plan:
    """Room for a step, and the one that is laid out in it. kept: what its pointers point to.

    batch: the one whose tensors `read` and `given` point into, if it is to be looked into once: a runner moves the tensors of a decode step on.
    """

    step: AttentionStep
    kept: tuple[torch.Tensor, ...]
    max_rows: int
    max_tokens: int
    address: int
    batch: BatchLayout | None = None
    read: tuple[torch.Tensor, ...] = ()
    given: tuple[int, ...] = ()


class PagedAttention:
    """A `RaggedGraphKernel` for layout BSGD."""

    def __init__(self, device: CpuDevice, geometry: AttentionGeometry) -> None:
        self._native, self._geometry = device.native, geometry
        self._dtype = torch.bfloat16 if geometry.dtype == "bfloat16" else torch.float32
        self._cached = torch.int8 if geometry.kv_dtype == "int8" else self._dtype
        if geometry.num_kv_heads < 1 or geometry.num_heads % geometry.num_kv_heads or geometry.num_heads < 1:
            raise ConfigError(
                f"cpu/paged wants as many query heads for each KV head: {geometry.num_heads} are not shared out equally among {geometry.num_kv_heads}"
            )
        if geometry.kv_dtype == "int8" and geometry.head_size > MOST_INT8_HEAD:
            raise ConfigError(
                f"[kv] cache_dtype = 'int8': cpu/paged takes heads of up to {MOST_INT8_HEAD} so, this model has {geometry.head_size}; use auto"
            )

    def plan(self, batch: BatchLayout) -> Plan:
        """Tasks of the step: so many queries of one row and KV head each.

        Raises ValueError for lengths or tables that do not fit together, IndexError for a hole that a query would see.
        """
        num_tokens = int(batch.query_starts[-1]) if len(batch.query_starts) else 0
        plan = self._room(max(0, num_tokens), *batch.block_tables.shape)
        self._lay_out(plan, batch)
        return plan

    def graph_plan(self, max_rows: int, max_blocks: int) -> Plan:
        """A plan of up to `max_rows` tokens, to be filled by `refill`."""
        return self._room(max_rows, max_rows, max_blocks)

    def refill(self, plan: Plan, batch: BatchLayout) -> None:
        """In place; the batch must fit, with one token a row."""
        self._lay_out(plan, batch, is_decode=True)

    def refill_ragged(self, plan: Plan, batch: BatchLayout) -> None:
        """In place; the tokens of the batch must fit."""
        self._lay_out(plan, batch)

    def _room(self, max_tokens: int, max_rows: int, max_blocks: int) -> Plan:
        geometry = self._geometry
        shapes = ((max_rows + 1,), (max_rows,), (max_rows, max_blocks), (max_tokens * geometry.num_kv_heads, 3))
        kept = starts, kv_lens, tables, tasks = tuple(torch.empty(shape, dtype=torch.int32) for shape in shapes)
        step = AttentionStep(
            query_starts=starts.data_ptr(), kv_lens=kv_lens.data_ptr(), tables=tables.data_ptr(), tasks=tasks.data_ptr(),
            table_width=max_blocks, highest_block=-1, num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size, block_size=geometry.block_size, window=geometry.sliding_window or 0, scale=geometry.scale,
            soft_cap=geometry.soft_cap or 0.0, is_bf16=int(self._dtype == torch.bfloat16), is_int8=int(self._cached == torch.int8),
        )  # fmt: skip
        return Plan(step, kept, max_rows, max_tokens, ctypes.addressof(step))

    def _lay_out(self, plan: Plan, batch: BatchLayout, *, is_decode: bool = False) -> None:
        if plan.batch is not batch:
            self._look_into(plan, batch)
        found = -2
        if plan.given:
            found = self._native.attention_lay_out(plan.address, *plan.given, plan.max_rows, plan.max_tokens, is_decode)
        if found < -1:
            starts, kv_lens, tables = plan.read
            rows = f"{len(kv_lens)} rows with query starts {starts.tolist()}, KV lengths {kv_lens.tolist()} and"
            if found == -3:
                raise IndexError(
                    f"{rows} tables {tables.tolist()} of blocks of {self._geometry.block_size}: a block is -1 or less where a query sees it"
                )
            raise ValueError(
                f"{rows} tables {tuple(tables.shape)} of blocks"
                f" of {self._geometry.block_size} do not fit each other, or not {plan.max_rows} rows with {plan.max_tokens} new tokens"
                f" and {plan.step.table_width} blocks{', one token a row' if is_decode else ''}"
            )

    @staticmethod
    def _look_into(plan: Plan, batch: BatchLayout) -> None:
        tensors = (batch.query_starts, batch.kv_lens, batch.block_tables)
        if not all(t.dtype == torch.int32 and t.is_cpu for t in tensors):
            raise ValueError(
                f"query starts, KV lengths and tables must be int32 on the CPU, they are {[t.dtype for t in tensors]} on"
                f" {[str(t.device) for t in tensors]}"
            )
        plan.read = starts, kv_lens, tables = tuple(t.contiguous() for t in tensors)
        num_rows, width = tables.shape
        fits = len(starts) == num_rows + 1 and len(kv_lens) == num_rows
        plan.given = (starts.data_ptr(), kv_lens.data_ptr(), tables.data_ptr(), num_rows, width) if fits else ()
        plan.batch = batch if all(read is given for read, given in zip(plan.read, tensors, strict=True)) else None

    def run(self, q: torch.Tensor, kv: KVSegments, plan: Plan, out: torch.Tensor) -> None:
        """q, out: [T, H, D]; kv.own: (k, v), each [B, S, G, D], and of int8 their steps, each [B, S, G].

        Raises ValueError or IndexError before anything is read that is not there.
        """
        geometry = self._geometry
        k, v, *steps = kv.own
        shape = (plan.max_tokens, geometry.num_heads, geometry.head_size)
        slot = (geometry.block_size, geometry.num_kv_heads, geometry.head_size)
        is_right = q.shape == out.shape == shape and k.shape == v.shape and k.shape[1:] == slot
        if (
            not is_right
            or not {t.dtype for t in (q, out)} == {self._dtype}
            or not {t.dtype for t in (k, v)} == {self._cached}
            or not all(t.is_contiguous() and t.is_cpu for t in kv.own)
            or not (q.is_cpu and out.is_cpu)
        ):
            raise ValueError(
                f"q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} must be {shape} {self._dtype} and (blocks, *{slot}) {self._cached},"
                " contiguous, on the CPU"
            )
        has_steps = [step.shape == k.shape[:3] and step.dtype == torch.float32 for step in steps]
        if has_steps != [True] * (2 if self._cached == torch.int8 else 0):
            raise ValueError(
                f"{len(steps)} tensors of steps {[tuple(step.shape) for step in steps]} beside k {tuple(k.shape)} {k.dtype}: of int8 there are two,"
                " [B, S, G] float32, of others none"
            )
        q = q.contiguous()
        target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        k_steps, v_steps = (step.data_ptr() for step in steps) if steps else (None, None)
        if self._native.attention(
            plan.address, q.data_ptr(), k.data_ptr(), v.data_ptr(), k_steps, v_steps, target.data_ptr(), len(k)
        ):
            raise IndexError(f"a table names block {plan.step.highest_block}, the cache has {len(k)}")
        if target is not out:
            out.copy_(target)
