"""Paged attention over native kernels. What the kernel does, and its limits, stand in `native/attention.cpp`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from xllm_core.plugins import AttentionGeometry, BatchLayout, KVSegments
from xllm_cpu.device import CpuDevice
from xllm_cpu.native import AttentionCall


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: the call, but for its tensors, and what its pointers point to. highest_block: in any table."""

    call: AttentionCall
    kept: tuple[torch.Tensor, ...]
    num_tokens: int
    highest_block: int


class PagedAttention:
    """An `AttentionKernel` for layout BSGD."""

    def __init__(self, device: CpuDevice, geometry: AttentionGeometry) -> None:
        self._native, self._geometry = device.native, geometry
        self._dtype = torch.bfloat16 if geometry.dtype == "bfloat16" else torch.float32

    def plan(self, batch: BatchLayout) -> Plan:
        """Tasks of the step: so many queries of one row and KV head each. Raises ValueError for lengths or tables that do not fit together."""
        geometry = self._geometry
        starts, kv_lens, tables = (
            t.to(torch.int32).contiguous() for t in (batch.query_starts, batch.kv_lens, batch.block_tables)
        )
        num_rows = len(kv_lens)
        longest = int(kv_lens.max()) if num_rows else 0
        if num_rows and (
            len(starts) != num_rows + 1
            or bool((starts.diff() > kv_lens).any())
            or longest > tables.shape[1] * geometry.block_size
        ):
            raise ValueError(
                f"{num_rows} rows of up to {longest} tokens do not fit {len(starts)} starts and"
                f" tables of {tables.shape[1]} blocks of {geometry.block_size}"
            )
        shape = (num_rows, geometry.num_heads, geometry.num_kv_heads)
        num_tasks = self._native.attention_tasks(starts.data_ptr(), *shape, None)
        tasks = torch.empty(num_tasks, 3, dtype=torch.int32)
        self._native.attention_tasks(starts.data_ptr(), *shape, tasks.data_ptr())
        call = AttentionCall(
            query_starts=starts.data_ptr(), kv_lens=kv_lens.data_ptr(), tables=tables.data_ptr(), tasks=tasks.data_ptr(), num_tasks=num_tasks,
            table_width=tables.shape[1], num_rows=num_rows, num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size, block_size=geometry.block_size, window=geometry.sliding_window or 0, scale=geometry.scale,
            soft_cap=geometry.soft_cap or 0.0, is_bf16=int(self._dtype == torch.bfloat16), max_kv_len=longest,
        )  # fmt: skip
        highest = int(tables.max()) if tables.numel() else -1
        return Plan(call, (starts, kv_lens, tables, tasks), int(starts[-1]), highest)

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
        call = plan.call
        call.q, call.k, call.v, call.out, call.num_blocks = (
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            target.data_ptr(),
            len(k),
        )
        self._native.attention(ctypes.byref(call))
        if target is not out:
            out.copy_(target)
