"""Token choice without sorting: what chunks of a row share, and the choice itself by thresholds that are found four bits at a time.

Floats are read as integers that keep their order. Counting (top-k) or weighing (top-p) the sixteen values of the next four bits tells which of them
holds the threshold; eight rounds give it exactly. Noise is `xllm_core.plugins.gumbel`: SplitMix64 of (stream key, token id).

A row is shared by one program per chunk until few tokens are left to look at: see `sampling_chunks`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_GAMMA = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15, and the mixing factors, as signed numbers
_MIX_1 = tl.constexpr(-4658895280553007687)  # 0xBF58476D1CE4E5B9
_MIX_2 = tl.constexpr(-7723592293110705685)  # 0x94D049BB133111EB


@triton.jit
def ordered(scores):
    """float32 -> uint32 in the same order; -0.0 is 0.0, or a filter would part scores that are equal."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def gumbel_noise(key, token_ids):
    """Standard Gumbel noise, float32. key: int64, token_ids: [N] int64."""
    z = key + (token_ids + 1) * _GAMMA
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    uniform = ((((z >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) + 0.5) * 1.1102230246251565e-16).to(tl.float32)
    uniform = tl.minimum(uniform, 1 - 5.9604644775390625e-08)
    # log1p(-u) from log alone: what rounding takes from 1 - u is divided out again.
    rest = 1 - uniform
    lost = 1 - rest
    exponential = tl.where(lost == 0.0, uniform, -tl.log(rest) * (uniform / tl.where(lost == 0.0, 1.0, lost)))
    return -tl.log(exponential)


@triton.jit
def row_scores(values, start, length, best, temperature, BLOCK: tl.constexpr):
    """(places, scores counted from the likeliest, divided by the temperature); -inf beyond the row. values: [length] float32."""
    place = start + tl.arange(0, BLOCK)
    raw = tl.load(values + place, mask=place < length, other=float("-inf"))
    return place, tl.div_rn(raw - best, tl.zeros_like(raw) + temperature)


@triton.jit
def row_filters(top_ks, top_ps, row, vocab, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr):
    """(top_k, 0 where it is off or keeps all, top_p, 1 where it is off) of a row: int32, float32."""
    top_k = tl.zeros([], tl.int32)
    top_p = tl.full([], 1.0, tl.float32)
    if HAS_TOP_K:
        wanted = tl.load(top_ks + row)
        top_k = tl.where((wanted > 0) & (wanted < vocab), wanted, 0).to(tl.int32)
    if HAS_TOP_P:
        top_p = tl.load(top_ps + row)
    return top_k, top_p


@triton.jit
def min_p_score(min_ps, row, HAS_MIN_P: tl.constexpr):
    """The least score that min-p keeps: the likeliest scores 0."""
    lowest = tl.full([], float("-inf"), tl.float32)
    if HAS_MIN_P:
        min_p = tl.load(min_ps + row)
        lowest = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), lowest)
    return lowest


@triton.jit
def better_of(values, tokens, is_valid, best, best_token):
    """(highest value, its token) of `values`, [N] float32, and of what was best before; of equal ones the smallest token. tokens: [N] int32."""
    values = tl.where(is_valid, values, float("-inf"))
    high = tl.max(values, 0)
    token = tl.min(tl.where(values == high, tokens, 2147483647), 0)
    is_better = (high > best) | ((high == best) & (high > float("-inf")) & (token < best_token))
    return tl.where(is_better, high, best), tl.where(is_better, token, best_token)


@triton.jit
def merge_chunks(maxima, tokens, row, num_chunks, CHUNKS: tl.constexpr):
    """(highest, its token) over the chunks of a row; token 0 where all are -inf. maxima, tokens: [S, num_chunks]."""
    chunk = tl.arange(0, CHUNKS)
    is_chunk = chunk < num_chunks
    values = tl.load(maxima + row * num_chunks + chunk, mask=is_chunk, other=float("-inf"))
    at = tl.load(tokens + row * num_chunks + chunk, mask=is_chunk, other=0)
    return better_of(values, at, is_chunk, tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.int32))


@triton.jit
def merge_weights(weights, row, num_chunks, CHUNKS: tl.constexpr):
    """The sum over the chunks of a row, in one order always. weights: [S, num_chunks] float32."""
    chunk = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(weights + row * num_chunks + chunk, mask=chunk < num_chunks, other=0.0), 0)


@triton.jit
def top_k_threshold(values, length, best, temperature, wanted, BLOCK: tl.constexpr):
    """The score with that rank, ties counted, as `ordered` gives it. 1 <= wanted <= length, int32."""
    digit = tl.arange(0, 16)
    prefix = tl.zeros([], tl.uint32)
    for shift_at in range(8):
        shift = 28 - 4 * shift_at
        counts = tl.zeros([16], tl.int32)
        for start in range(0, length, BLOCK):
            place, scores = row_scores(values, start, length, best, temperature, BLOCK)
            keys = ordered(scores)
            is_candidate = (place < length) & ((keys >> shift >> 4) == prefix)
            is_here = is_candidate[:, None] & (((keys >> shift) & 15)[:, None] == digit[None, :])
            counts += tl.sum(is_here.to(tl.int32), 0)
        at_least = tl.cumsum(counts, 0, reverse=True)
        chosen = tl.max(tl.where(at_least >= wanted, digit, 0), 0)
        wanted -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
        prefix = prefix * 16 + chosen.to(tl.uint32)
    return prefix


@triton.jit
def top_p_threshold(values, length, best, temperature, floor, top_p, above, total, BLOCK: tl.constexpr):
    """The smallest score, of those not below `floor`, whose betters weigh less than top_p of all; the likeliest of them in any case.

    above: weight of what is better than all `values`. total: of all, or 0 where that is `above` and the values not below `floor`.
    """
    digit = tl.arange(0, 16)
    prefix = tl.zeros([], tl.uint32)
    limit = tl.zeros([], tl.float32)
    for shift_at in range(8):
        shift = 28 - 4 * shift_at
        weights = tl.zeros([16], tl.float32)
        for start in range(0, length, BLOCK):
            place, scores = row_scores(values, start, length, best, temperature, BLOCK)
            keys = ordered(scores)
            is_candidate = (place < length) & (keys >= floor) & ((keys >> shift >> 4) == prefix)
            is_here = is_candidate[:, None] & (((keys >> shift) & 15)[:, None] == digit[None, :])
            weights += tl.sum(tl.where(is_here, tl.exp(scores)[:, None], 0.0), 0)
        if shift_at == 0:  # every candidate was weighed
            limit = top_p * tl.where(total > 0, total, above + tl.sum(weights, 0))
        at_least = tl.cumsum(weights, 0, reverse=True)
        is_open = (weights > 0) & (above + (at_least - weights) < limit)
        heaviest = tl.max(tl.where(weights > 0, digit, 0), 0)
        chosen = tl.minimum(tl.min(tl.where(is_open, digit, 16), 0), heaviest)
        above += tl.sum(tl.where(digit > chosen, weights, 0.0), 0)
        prefix = prefix * 16 + chosen.to(tl.uint32)
    return prefix


@triton.jit
def choose_tokens(
    logits, maxima, tokens, noised, noised_tokens, weights, sure_weights, facts, open_logits, open_tokens,
    temperatures, top_ks, top_ps, min_ps, keys, chosen, stride_row, vocab, num_chunks,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    CHUNKS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, from what its chunks found. Writes chosen, [S] int64; the rest as in `sampling_chunks`.

    Where the open tokens found no room, the whole row is searched instead.
    """
    row = tl.program_id(0).to(tl.int64)
    best, token = merge_chunks(maxima, tokens, row, num_chunks, CHUNKS)
    temperature = tl.load(temperatures + row)
    if (temperature > 0) & (tl.abs(best) < float("inf")):
        high, high_token = merge_chunks(noised, noised_tokens, row, num_chunks, CHUNKS)
        if HAS_TOP_K or HAS_TOP_P:
            top_k, top_p = row_filters(top_ks, top_ps, row, vocab, HAS_TOP_K, HAS_TOP_P)
            if (top_k > 0) | (top_p < 1):
                num_open = tl.load(facts + row * 2)
                has_room = num_open <= ROOM
                values = open_logits + row * ROOM
                if num_open > ROOM:
                    values = logits + row * stride_row
                length = tl.where(has_room, num_open, vocab)
                wanted = tl.where(has_room, tl.load(facts + row * 2 + 1), top_k)
                floor = tl.zeros([], tl.uint32)
                if HAS_TOP_K:
                    if wanted > 0:
                        floor = top_k_threshold(values, length, best, temperature, wanted, BLOCK)
                if HAS_TOP_P:
                    if top_p < 1:
                        above = tl.where(has_room, merge_weights(sure_weights, row, num_chunks, CHUNKS), 0.0)
                        total = tl.where(wanted > 0, 0.0, merge_weights(weights, row, num_chunks, CHUNKS))
                        by_p = top_p_threshold(values, length, best, temperature, floor, top_p, above, total, BLOCK)
                        floor = tl.maximum(floor, by_p)
                lowest = min_p_score(min_ps, row, HAS_MIN_P)
                key = tl.load(keys + row)
                high = tl.where(has_room, high, float("-inf"))
                for start in range(0, length, BLOCK):
                    place, scores = row_scores(values, start, length, best, temperature, BLOCK)
                    named = tl.load(open_tokens + row * ROOM + place, mask=has_room & (place < length), other=0)
                    at = tl.where(has_room, named, place)
                    is_kept = (place < length) & (ordered(scores) >= floor) & (scores >= lowest)
                    value = scores + gumbel_noise(key, at.to(tl.int64))
                    high, high_token = better_of(value, at, is_kept, high, high_token)
        token = tl.where(high > float("-inf"), high_token, token)
    tl.store(chosen + row, token.to(tl.int64))
