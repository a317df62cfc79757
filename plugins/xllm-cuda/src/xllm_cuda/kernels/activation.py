"""The gate of an MLP."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu_mul_rows(gate_up, out, num_rows, size, stride_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = silu(first half) * second half. gate_up: [N, 2 * size] with a row stride, out: [N, size]; one program: ROWS rows, BLOCK columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < size)[None, :]
    gate_at = gate_up + row[:, None] * stride_row + column[None, :]
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + size, mask=mask, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row[:, None] * size + column[None, :], gated.to(out.dtype.element_ty), mask=mask)
