"""What moves entries and blocks of the KV cache, and computes nothing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_entries(
    new, cache, slots, size, inner, stride_token, stride_inner, stride_block, stride_slot, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK elements of one token's entry. new: [T, size // inner, inner] with strides, cache: [B, S, size] with strides, slots:
    [T] int64, counted over B * S; -1 is skipped.
    """
    token = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + token)
    mask = (element < size) & (slot >= 0)
    source = new + token * stride_token + element // inner * stride_inner + element % inner
    target = cache + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot + element
    tl.store(target, tl.load(source, mask=mask, other=0.0).to(cache.dtype.element_ty), mask=mask)


@triton.jit
def copy_rows(addresses, buffer, rows, num_words, num_tensors, TO_BUFFER: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK words of row rows[n] of one tensor, to or from its place in `buffer`.

    addresses: [L] int64, where each tensor begins. rows: [N] int64. buffer: [N, L, num_words] int32. A copy is two launches, so that every row is
    read before any is written.
    """
    n, tensor = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    begin = tl.load(addresses + tensor).to(tl.pointer_type(tl.int32)) + tl.load(rows + n) * num_words
    place = buffer + (n * num_tensors + tensor) * num_words + word
    if TO_BUFFER:
        tl.store(place, tl.load(begin + word, mask=mask), mask=mask)
    else:
        tl.store(begin + word, tl.load(place, mask=mask), mask=mask)
