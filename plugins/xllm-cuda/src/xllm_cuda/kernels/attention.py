"""Paged ragged attention: one kernel for prompts, chunks and decode, and the merge of its splits; both also for launches whose grid cannot change.

A tile is BLOCK_M rows of scores: BLOCK_Q = BLOCK_M // GROUP queries of one sequence times the GROUP heads that share a KV head, so that keys are
read once for all of them. A program does one tile, one KV head and one split of the keys. Splits begin at multiples of SPLIT, whatever
the batch is, and are merged in order: a row's result does not depend on its neighbours. Softmax as it comes: arXiv:1805.02867, arXiv:2205.14135.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of one entry of the tile list, int32 each.
TILE_FIELDS = tl.constexpr(8)


@triton.jit
def attend_tiles(
    q, k, v, out, tiles, tables, partial_acc, partial_max, partial_sum, scale, soft_cap,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_block, stride_slot, stride_kv_head, stride_table,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile and split, one KV head.

    q, out: [T, H, D]; k, v: [B, S, G, D], equal strides; tables: [R, stride_table] int32. tiles: [N, 8] int32: table row, first token in q,
    position of that token, number of queries, split, first visible key, keys in all, place in the partial buffers or -1 for `out`.
    partial_acc: [P, G, BLOCK_M, BLOCK_D] float32; partial_max, partial_sum: [P, G, BLOCK_M] float32. scale includes log2(e) where there is no
    soft cap. WINDOW: 0 for none.
    """
    entry = tiles + tl.program_id(0) * TILE_FIELDS
    row_max, row_sum, acc = _attend(
        q, k, v, entry, tables, scale, soft_cap,
        stride_q_token, stride_q_head, stride_block, stride_slot, stride_kv_head, stride_table,
        GROUP, HEAD_SIZE, BLOCK_SIZE, WINDOW, HAS_SOFT_CAP, BLOCK_M, BLOCK_N, BLOCK_D, SPLIT, PRECISION,
    )  # fmt: skip
    if tl.load(entry + 7) < 0:
        _store(
            out, tl.load(entry + 1).to(tl.int64), tl.load(entry + 3), row_sum, acc, stride_out_token, stride_out_head,
            GROUP, HEAD_SIZE, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    else:
        _store_partial(partial_acc, partial_max, partial_sum, entry, row_max, row_sum, acc, BLOCK_M, BLOCK_D)


@triton.jit
def attend_in_place(
    q, k, v, out, header, tiles, tables, scale, soft_cap,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_block, stride_slot, stride_kv_head, stride_table,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `attend_tiles`, for a grid that stays as it is: programs take tiles in turn until there are no more.

    header: [4] int64: number of tiles, then where partial_acc, partial_max and partial_sum are.
    """
    num_tiles = tl.load(header).to(tl.int32)
    # What would be computed once for all tiles takes registers from each of them: it spilled.
    for at in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=True):
        entry = tiles + at * TILE_FIELDS
        row_max, row_sum, acc = _attend(
            q, k, v, entry, tables, scale, soft_cap,
            stride_q_token, stride_q_head, stride_block, stride_slot, stride_kv_head, stride_table,
            GROUP, HEAD_SIZE, BLOCK_SIZE, WINDOW, HAS_SOFT_CAP, BLOCK_M, BLOCK_N, BLOCK_D, SPLIT, PRECISION,
        )  # fmt: skip
        if tl.load(entry + 7) < 0:
            _store(
                out, tl.load(entry + 1).to(tl.int64), tl.load(entry + 3), row_sum, acc, stride_out_token, stride_out_head,
                GROUP, HEAD_SIZE, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        else:
            _store_partial(
                _scratch(header + 1),
                _scratch(header + 2),
                _scratch(header + 3),
                entry,
                row_max,
                row_sum,
                acc,
                BLOCK_M,
                BLOCK_D,
            )


@triton.jit
def _scratch(address):
    """float32 at an address; allocations begin at multiples of 512."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _attend(
    q, k, v, entry, tables, scale, soft_cap, stride_q_token, stride_q_head, stride_block, stride_slot, stride_kv_head, stride_table,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile and split, one KV head: greatest score and sum of weights of each score row [BLOCK_M], weighted values [BLOCK_M, BLOCK_D]."""
    kv_head = tl.program_id(1)
    table_row, first_token = tl.load(entry), tl.load(entry + 1).to(tl.int64)
    first_position, num_queries = tl.load(entry + 2), tl.load(entry + 3)
    split, first_key, num_keys = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query = m // GROUP
    head = kv_head * GROUP + m % GROUP
    is_row = query < num_queries
    is_element = d < HEAD_SIZE
    q_offsets = (first_token + query) * stride_q_token + head * stride_q_head
    tile_q = tl.load(q + q_offsets[:, None] + d[None, :], mask=is_row[:, None] & is_element[None, :], other=0.0)
    position = first_position + query

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Steps of BLOCK_N begin at multiples of it, so that a key is always added in the same company.
    begin = tl.maximum(split * SPLIT, first_key // BLOCK_N * BLOCK_N)
    end = tl.minimum(split * SPLIT + SPLIT, num_keys)
    # Up to the last key that the first query sees every score counts, unless there is a window: nothing is masked there.
    middle = begin
    if WINDOW == 0:
        middle = tl.maximum(begin, tl.minimum(end, (first_position + 1) // BLOCK_N * BLOCK_N))
    table = tables + table_row * stride_table
    k_head, v_head = k + kv_head * stride_kv_head, v + kv_head * stride_kv_head
    # What would be computed once for all steps takes registers from each of them: it spilled.
    for start in tl.range(begin, middle, BLOCK_N, disable_licm=True):
        row_max, row_sum, acc = _step(
            tile_q, k_head, v_head, table, start, position, first_key, num_keys, row_max, row_sum, acc, scale, soft_cap, stride_block,
            stride_slot, HEAD_SIZE, BLOCK_SIZE, WINDOW, HAS_SOFT_CAP, BLOCK_N, BLOCK_D, PRECISION, False,
        )  # fmt: skip
    for start in range(middle, end, BLOCK_N):
        row_max, row_sum, acc = _step(
            tile_q, k_head, v_head, table, start, position, first_key, num_keys, row_max, row_sum, acc, scale, soft_cap, stride_block,
            stride_slot, HEAD_SIZE, BLOCK_SIZE, WINDOW, HAS_SOFT_CAP, BLOCK_N, BLOCK_D, PRECISION, True,
        )  # fmt: skip
    return row_max, row_sum, acc


@triton.jit
def _step(
    tile_q, k, v, table, start, position, first_key, num_keys, row_max, row_sum, acc, scale, soft_cap, stride_block, stride_slot,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys from `start` on, of one KV head. Without IS_MASKED every query sees all of them. Rows beyond the tile's queries are nobody's."""
    d = tl.arange(0, BLOCK_D)
    key = start + tl.arange(0, BLOCK_N)
    is_element = d < HEAD_SIZE
    if IS_MASKED:
        is_key = (key >= first_key) & (key < num_keys)
        block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        k_mask, v_mask = is_key[None, :] & is_element[:, None], is_key[:, None] & is_element[None, :]
    else:
        block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
        k_mask, v_mask = is_element[:, None], is_element[None, :]
    offsets = block * stride_block + (key % BLOCK_SIZE) * stride_slot
    tile_k = tl.load(k + offsets[None, :] + d[:, None], mask=k_mask, other=0.0)
    scores = tl.dot(tile_q, tile_k, input_precision=PRECISION) * scale
    if HAS_SOFT_CAP:
        # tanh by exp2 of a negative number, which cannot overflow; then in units of log2(e) as without a cap.
        ratio = tl.exp2(-2.8853900817779268 * tl.abs(scores) / soft_cap)
        tanh = (1 - ratio) / (1 + ratio)
        scores = tl.where(scores < 0, -tanh, tanh) * soft_cap * 1.4426950408889634
    if IS_MASKED:
        is_visible = is_key[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            is_visible = is_visible & (position[:, None] - key[None, :] < WINDOW)
        scores = tl.where(is_visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum to subtract.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    tile_v = tl.load(v + offsets[:, None] + d[None, :], mask=v_mask, other=0.0)
    acc = acc * shrink[:, None] + tl.dot(weights.to(tile_v.dtype), tile_v, input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def _store(
    out, first_token, num_queries, row_sum, acc, stride_out_token, stride_out_head,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The result of a tile, or of all its splits."""
    kv_head = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query = m // GROUP
    offsets = (first_token + query) * stride_out_token + (kv_head * GROUP + m % GROUP) * stride_out_head
    mask = (query < num_queries)[:, None] & (d < HEAD_SIZE)[None, :]
    # Rows beyond the tile's queries saw nothing; they are not stored, and must not divide by zero.
    normed = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(out + offsets[:, None] + d[None, :], normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store_partial(
    partial_acc, partial_max, partial_sum, entry, row_max, row_sum, acc, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One split of a tile."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    rows = (tl.load(entry + 7).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_M + m
    tl.store(partial_acc + rows[:, None] * BLOCK_D + d[None, :], acc)
    tl.store(partial_max + rows, row_max)
    tl.store(partial_sum + rows, row_sum)


@triton.jit
def merge_splits(
    out, merges, partial_acc, partial_max, partial_sum, stride_out_token, stride_out_head,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: all splits of one tile and one KV head, in order, weighted by their log-sum-exp. merges: [N, 4] int32: first token,
    number of queries, first place, number of places. A split in which a row sees nothing has the weight 0 and changes no bit.
    """
    _merge(
        out, merges + tl.program_id(0) * 4, partial_acc, partial_max, partial_sum, stride_out_token, stride_out_head,
        GROUP, HEAD_SIZE, BLOCK_M, BLOCK_D,
    )  # fmt: skip


@triton.jit
def merge_in_place(
    out, header, merges, stride_out_token, stride_out_head,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `merge_splits`, after `attend_in_place`. An entry without queries is of a row with one split, or of none."""
    entry = merges + tl.program_id(0) * 4
    if tl.load(entry + 1) > 0:
        _merge(
            out, entry, _scratch(header + 1), _scratch(header + 2), _scratch(header + 3), stride_out_token, stride_out_head,
            GROUP, HEAD_SIZE, BLOCK_M, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _merge(
    out, entry, partial_acc, partial_max, partial_sum, stride_out_token, stride_out_head,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All splits of one tile and one KV head."""
    kv_head = tl.program_id(1)
    first_token, num_queries = tl.load(entry).to(tl.int64), tl.load(entry + 1)
    first_place = tl.load(entry + 2).to(tl.int64)
    end_place = first_place + tl.load(entry + 3)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    all_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for place in range(first_place, end_place):
        rows = (place * tl.num_programs(1) + kv_head) * BLOCK_M + m
        all_max = tl.maximum(all_max, tl.load(partial_max + rows))
    base = tl.where(all_max == float("-inf"), 0.0, all_max)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for place in range(first_place, end_place):
        rows = (place * tl.num_programs(1) + kv_head) * BLOCK_M + m
        weight = tl.exp2(tl.load(partial_max + rows) - base)
        total += weight * tl.load(partial_sum + rows)
        acc += weight[:, None] * tl.load(partial_acc + rows[:, None] * BLOCK_D + d[None, :])
    _store(
        out, first_token, num_queries, total, acc, stride_out_token, stride_out_head, GROUP, HEAD_SIZE, BLOCK_M, BLOCK_D
    )  # fmt: skip
