"""RMSNorm, alone and after an addition. Source: arXiv:1910.07467."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_rows(
    x, weight, out, num_rows, size, eps, stride_outer, stride_inner,
    INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x, each `size` long in BLOCK columns; row i begins at i // INNER * stride_outer + i % INNER * stride_inner. out: [N, size]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < size)[None, :]
    begin = row // INNER * stride_outer + row % INNER * stride_inner
    wide = tl.load(x + begin[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1) / size + eps)
    # The definition rounds before it multiplies with the weight.
    normed = (wide * factor[:, None]).to(out.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * size + column[None, :], (normed * scale[None, :]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_rows(
    x, residual, weight, out, total, num_rows, size, eps, stride_x, stride_residual, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """total = residual + x, out = its norm. x, residual: [N, size] with row strides; out, total: [N, size]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < size)[None, :]
    left = tl.load(x + row[:, None] * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
    right = tl.load(residual + row[:, None] * stride_residual + column[None, :], mask=mask, other=0.0).to(tl.float32)
    rounded = (left + right).to(total.dtype.element_ty)
    offsets = row[:, None] * size + column[None, :]
    tl.store(total + offsets, rounded, mask=mask)
    wide = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1) / size + eps)
    normed = (wide * factor[:, None]).to(out.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out + offsets, (normed * scale[None, :]).to(out.dtype.element_ty), mask=mask)
