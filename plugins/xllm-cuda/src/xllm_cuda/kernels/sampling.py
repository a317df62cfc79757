"""Token choice without sorting: every filter is a threshold on the score, and a threshold is found four bits at a time.

Floats are read as integers that keep their order. Counting (top-k) or weighing (top-p) the sixteen values of the next four bits tells which of them
holds the threshold; eight rounds give it exactly. Noise is `xllm_core.plugins.gumbel`: SplitMix64 of (stream key, token id).
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
def row_scores(logits, start, vocab, best, temperature, BLOCK: tl.constexpr):
    """(token ids, scores counted from the likeliest, divided by the temperature); -inf beyond the row."""
    token = start + tl.arange(0, BLOCK)
    raw = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
    return token, tl.div_rn(raw - best, tl.zeros_like(raw) + temperature)


@triton.jit
def top_k_threshold(logits, vocab, best, temperature, top_k, BLOCK: tl.constexpr):
    """The top_k-th largest score of a row, ties counted, as `ordered` gives it. 1 <= top_k <= vocab."""
    digit = tl.arange(0, 16)
    prefix = tl.zeros([], tl.uint32)
    wanted = top_k.to(tl.int32)
    for shift_at in range(8):
        shift = 28 - 4 * shift_at
        counts = tl.zeros([16], tl.int32)
        for start in range(0, vocab, BLOCK):
            token, scores = row_scores(logits, start, vocab, best, temperature, BLOCK)
            keys = ordered(scores)
            is_candidate = (token < vocab) & ((keys >> shift >> 4) == prefix)
            is_here = is_candidate[:, None] & (((keys >> shift) & 15)[:, None] == digit[None, :])
            counts += tl.sum(is_here.to(tl.int32), 0)
        at_least = tl.cumsum(counts, 0, reverse=True)
        chosen = tl.max(tl.where(at_least >= wanted, digit, 0), 0)
        wanted -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
        prefix = prefix * 16 + chosen.to(tl.uint32)
    return prefix


@triton.jit
def top_p_threshold(logits, vocab, best, temperature, floor, top_p, BLOCK: tl.constexpr):
    """The smallest score, of those not below `floor`, whose betters weigh less than top_p of all of these; the likeliest in any case."""
    digit = tl.arange(0, 16)
    prefix = tl.zeros([], tl.uint32)
    above = tl.zeros([], tl.float32)
    limit = tl.zeros([], tl.float32)
    for shift_at in range(8):
        shift = 28 - 4 * shift_at
        weights = tl.zeros([16], tl.float32)
        for start in range(0, vocab, BLOCK):
            token, scores = row_scores(logits, start, vocab, best, temperature, BLOCK)
            keys = ordered(scores)
            is_candidate = (token < vocab) & (keys >= floor) & ((keys >> shift >> 4) == prefix)
            is_here = is_candidate[:, None] & (((keys >> shift) & 15)[:, None] == digit[None, :])
            weights += tl.sum(tl.where(is_here, tl.exp(scores)[:, None], 0.0), 0)
        if shift_at == 0:  # every candidate was weighed
            limit = top_p * tl.sum(weights, 0)
        at_least = tl.cumsum(weights, 0, reverse=True)
        is_open = (weights > 0) & (above + (at_least - weights) < limit)
        heaviest = tl.max(tl.where(weights > 0, digit, 0), 0)
        chosen = tl.minimum(tl.min(tl.where(is_open, digit, 16), 0), heaviest)
        above += tl.sum(tl.where(digit > chosen, weights, 0.0), 0)
        prefix = prefix * 16 + chosen.to(tl.uint32)
    return prefix


@triton.jit
def sample_rows(
    logits, temperatures, top_ks, top_ps, min_ps, keys, chosen, stride_row, vocab,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row. logits: [S, V] float32, only read; temperatures, top_ps, min_ps: [S] float32; top_ks, keys, chosen: [S] int64.

    Temperature 0 takes the likeliest; top_k 0 and top_p 1 are off. Of equal scores the smallest token id wins.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_row
    temperature = tl.load(temperatures + row)
    best = tl.full([], float("-inf"), tl.float32)
    best_token = tl.zeros([], tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
        high = tl.max(raw, 0)
        at = tl.min(tl.where((raw == high) & (token < vocab), token, vocab), 0)
        best_token = tl.where(high > best, at, best_token)
        best = tl.maximum(best, high)
    if temperature > 0:
        floor = tl.zeros([], tl.uint32)
        if HAS_TOP_K:
            top_k = tl.load(top_ks + row)
            if (top_k > 0) & (top_k < vocab):
                floor = top_k_threshold(logits, vocab, best, temperature, top_k, BLOCK)
        if HAS_TOP_P:
            top_p = tl.load(top_ps + row)
            if top_p < 1:
                floor = tl.maximum(floor, top_p_threshold(logits, vocab, best, temperature, floor, top_p, BLOCK))
        if HAS_MIN_P:
            min_p = tl.load(min_ps + row)
            if min_p > 0:
                floor = tl.maximum(floor, ordered(tl.log(min_p)))
        key = tl.load(keys + row)
        best_noised = tl.full([], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            token, scores = row_scores(logits, start, vocab, best, temperature, BLOCK)
            is_kept = (token < vocab) & (ordered(scores) >= floor)
            noised = tl.where(is_kept, scores + gumbel_noise(key, token.to(tl.int64)), float("-inf"))
            high = tl.max(noised, 0)
            at = tl.min(tl.where(noised == high, token, vocab), 0)
            best_token = tl.where(high > best_noised, at, best_token)
            best_noised = tl.maximum(best_noised, high)
    tl.store(chosen + row, best_token.to(tl.int64))
