"""Rotary position embedding on half-split pairs, with and without storing keys and values on the way. Source: arXiv:2104.09864."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rope_heads(
    q, k, v, q_out, k_out, v_out, cos, sin, slots,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_cos,
    stride_block, stride_slot, stride_kv_head,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, WRITES_KV: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """One program: one token, HEADS of its heads; the first NUM_HEADS are q's, those behind them k's and, with WRITES_KV, v's.

    q: [T, Hq, D], k, v: [T, Hk, D] with strides; q_out: [T, Hq, D] contiguous; cos, sin: [T, 2 * HALF]. Without WRITES_KV k_out is [T, Hk, D]
    contiguous; with it k_out and v_out are caches [B, S, Hk, D] and slots [T] int64 says where; slot -1 is skipped.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    is_first = pair < HALF
    cos_row, sin_row = cos + token * stride_cos, sin + token * stride_cos
    cos_a = tl.load(cos_row + pair, mask=is_first, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_row + HALF + pair, mask=is_first, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_row + pair, mask=is_first, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_row + HALF + pair, mask=is_first, other=0.0).to(tl.float32)

    is_q = head < NUM_HEADS
    kv_head = head - NUM_HEADS
    is_k = (head >= NUM_HEADS) & (kv_head < NUM_KV_HEADS)
    source = tl.where(
        is_q, q + token * stride_q_token + head * stride_q_head, k + token * stride_k_token + kv_head * stride_k_head
    )
    if WRITES_KV:
        slot = tl.load(slots + token)
        is_k = is_k & (slot >= 0)
        kv_begin = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
        k_target = k_out + kv_begin + kv_head * stride_kv_head
    else:
        k_target = k_out + (token * NUM_KV_HEADS + kv_head) * HEAD_SIZE
    target = tl.where(is_q, q_out + (token * NUM_HEADS + head) * HEAD_SIZE, k_target)
    is_head = is_q | is_k
    is_pair = is_head & is_first
    a = tl.load(source + pair, mask=is_pair, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + pair, mask=is_pair, other=0.0).to(tl.float32)
    tl.store(target + pair, (a * cos_a - b * sin_a).to(q_out.dtype.element_ty), mask=is_pair)
    tl.store(target + HALF + pair, (b * cos_b + a * sin_b).to(q_out.dtype.element_ty), mask=is_pair)
    if REST > 0:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        is_rest = is_head & (rest < HEAD_SIZE)
        tl.store(target + rest, tl.load(source + rest, mask=is_rest, other=0.0), mask=is_rest)
    if WRITES_KV:
        v_head = kv_head - NUM_KV_HEADS
        element = tl.arange(0, ELEMENTS)[None, :]
        is_v = (v_head >= 0) & (v_head < NUM_KV_HEADS) & (slot >= 0) & (element < HEAD_SIZE)
        values = tl.load(v + token * stride_v_token + v_head * stride_v_head + element, mask=is_v, other=0.0)
        tl.store(v_out + kv_begin + v_head * stride_kv_head + element, values, mask=is_v)
