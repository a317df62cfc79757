"""Token choice, where a program has one chunk of a row: the likeliest token, then scores put into bins, then those that a threshold must part.

A bin is a range of scores, so the counts of all bins bound where a threshold is: better tokens are kept for sure, worse ones are out, and only those
in between are open. They go to `choose_tokens`, in the order of their ids; the sure ones get their noise here. Sums over chunks are taken in one
order and counts are integers: a row's token does not depend on its neighbours nor on what ran first.

Arguments of these kernels and of `choose_tokens`. S rows, C chunks of CHUNK tokens, CHUNKS a power of two that is not less:

- logits: [S, V] float32, rows stride_row apart, only read; temperatures, top_ps, min_ps: [S] float32; top_ks, keys: [S] int64. Temperature 0 takes
  the likeliest, as do rows whose best is infinite; top_k 0 and top_p 1 are off. Of equal scores the smallest token id wins.
- maxima, noised: [S, C] float32, the chunk's highest logit, and the highest noised score of those surely kept; tokens, noised_tokens: [S, C] int32,
  their ids.
- weights, sure_weights: [S, C] float32, sums of exp(score) over the chunk, and over those surely kept. counts: [S, C, BINS] int32.
- facts: [S, 2] int32: number of open tokens; how many of them top-k keeps (ties apart), or 0 where it parts nothing.
- open_logits: [S, ROOM] float32, open_tokens: [S, ROOM] int32: the open tokens, where they have room.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xllm_cuda.kernels.sampling import (
    better_of,
    gumbel_noise,
    merge_chunks,
    merge_weights,
    min_p_score,
    row_filters,
    row_scores,
)

# Bins are as wide as the leading bits of a float: 32 to an octave of what a score is below 1/4, from 0 to -62.75. The last one has the rest, which
# no noise can lift: of 53 bits it is 37.5 at most, and the likeliest token, always kept, has -2.9 at least.
BINS = tl.constexpr(256)
_NEAREST = tl.constexpr(0.25)
_SHIFT = tl.constexpr(18)
_FIRST = tl.constexpr(4000)  # the bits of 1/4, shifted
_GROUP = tl.constexpr(16)  # chunks whose counts are read at once: more took too many registers
# Bounds of sums are taken with room for how sums are rounded.
_RELATIVE = tl.constexpr(1e-3)
_ABSOLUTE = tl.constexpr(1e-6)


@triton.jit
def score_bins(scores):
    """[N] int32, from 0 for the likeliest. scores: [N] float32, not above 0."""
    bits = (-scores + _NEAREST).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> _SHIFT) - _FIRST, 0), BINS - 1)


@triton.jit
def nearest_weights(bins):
    """exp of the highest score that each bin can hold."""
    return tl.exp(-((bins + _FIRST) << _SHIFT).to(tl.float32, bitcast=True) + _NEAREST)


@triton.jit
def count_chunks(counts, num_chunks):
    """(tokens in the chunks before this program's, tokens in the row), [BINS] int32 each. counts: [num_chunks, BINS] of a row."""
    bins = tl.arange(0, BINS)[None, :]
    before = tl.zeros([BINS], tl.int32)
    in_row = tl.zeros([BINS], tl.int32)
    for first in range(0, num_chunks, _GROUP):
        chunk = first + tl.arange(0, _GROUP)[:, None]
        found = tl.load(counts + chunk * BINS + bins, mask=(chunk < num_chunks) & (bins >= 0), other=0)
        before += tl.sum(tl.where(chunk < tl.program_id(1), found, 0), 0)
        in_row += tl.sum(found, 0)
    return before, in_row


@triton.jit
def open_bins(counts, top_k, top_p, total):
    """(lowest open bin, highest, how many of the tokens from the lowest on top-k keeps, or 0 where it parts nothing). counts: [BINS] of a row.

    total: weight of the row. Bins before the lowest hold only tokens that all filters keep, bins behind the highest none.
    """
    bins = tl.arange(0, BINS)
    last = tl.full([], BINS - 1, tl.int32)
    if top_k > 0:
        last = tl.minimum(tl.sum((tl.cumsum(counts, 0) < top_k).to(tl.int32), 0), BINS - 1)
    is_cut = last < BINS - 1
    lowest = last
    highest = tl.minimum(last, BINS - 2)
    if top_p < 1:
        # Weights by bins, at most and at least; of the bin that top-k parts, its part without ties at least.
        part = tl.where(is_cut, top_k - tl.sum(tl.where(bins < last, counts, 0), 0), 0)
        most = tl.where(bins <= last, counts, 0).to(tl.float32) * nearest_weights(bins)
        fewest = tl.where(bins < last, counts, tl.where(bins == last, part, 0))
        least = fewest.to(tl.float32) * nearest_weights(bins + 1)
        # A token is out if what it and worse ones would add begins within the last 1 - top_p of the whole.
        most_total = tl.where(is_cut, tl.sum(most, 0), total)
        least_total = tl.where(is_cut, tl.sum(least, 0), total)
        most_behind = tl.cumsum(most, 0, reverse=True) - most
        least_behind = tl.cumsum(least, 0, reverse=True) - least
        is_sure = least_behind > ((1 - top_p) * (1 + _RELATIVE) + _ABSOLUTE) * most_total
        is_last = most_behind <= ((1 - top_p) * (1 - _RELATIVE) - _ABSOLUTE) * least_total
        lowest = tl.minimum(lowest, tl.sum(is_sure.to(tl.int32), 0))
        # All that top-k keeps must be weighed.
        highest = tl.where(is_cut, highest, tl.minimum(highest, tl.sum((is_last == 0).to(tl.int32), 0)))
    wanted = tl.where(is_cut, top_k - tl.sum(tl.where(bins < lowest, counts, 0), 0), 0)
    return lowest, highest, wanted


@triton.jit
def best_of_chunks(logits, maxima, tokens, stride_row, vocab, num_chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the likeliest token of one chunk."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * CHUNK
    best = tl.full([], float("-inf"), tl.float32)
    best_token = tl.zeros([], tl.int32)
    for start in range(begin, tl.minimum(begin + CHUNK, vocab), BLOCK):
        token = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + row * stride_row + token, mask=token < vocab, other=float("-inf"))
        best, best_token = better_of(raw, token, token < vocab, best, best_token)
    tl.store(maxima + row * num_chunks + tl.program_id(1), best)
    tl.store(tokens + row * num_chunks + tl.program_id(1), best_token)


@triton.jit
def score_chunks(
    logits, maxima, tokens, noised, noised_tokens, weights, counts, temperatures, top_ks, top_ps, min_ps, keys,
    stride_row, vocab, num_chunks, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, WIDE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of a row. Where top-k or top-p is on, its tokens counted by bins and weighed; else its choice."""
    row = tl.program_id(0).to(tl.int64)
    here = row * num_chunks + tl.program_id(1)
    begin = tl.program_id(1) * CHUNK
    end = tl.minimum(begin + CHUNK, vocab)
    logits += row * stride_row
    best = merge_chunks(maxima, tokens, row, num_chunks, CHUNKS)[0]
    temperature = tl.load(temperatures + row)
    if (temperature > 0) & (tl.abs(best) < float("inf")):
        top_k, top_p = row_filters(top_ks, top_ps, row, vocab, HAS_TOP_K, HAS_TOP_P)
        if (top_k > 0) | (top_p < 1):
            weight = tl.zeros([], tl.float32)
            counted = tl.zeros([BINS], tl.int32)
            for start in range(begin, end, WIDE_BLOCK):
                scores = row_scores(logits, start, end, best, temperature, WIDE_BLOCK)[1]
                counted += tl.histogram(score_bins(scores), BINS)
                weight += tl.sum(tl.exp(scores), 0)
            tl.store(counts + here * BINS + tl.arange(0, BINS), counted)
            tl.store(weights + here, weight)
        else:
            lowest = min_p_score(min_ps, row, HAS_MIN_P)
            key = tl.load(keys + row)
            high = tl.full([], float("-inf"), tl.float32)
            high_token = tl.zeros([], tl.int32)
            for start in range(begin, end, BLOCK):
                token, scores = row_scores(logits, start, end, best, temperature, BLOCK)
                is_kept = (token < end) & (scores >= lowest)
                value = scores + gumbel_noise(key, token.to(tl.int64))
                high, high_token = better_of(value, token, is_kept, high, high_token)
            tl.store(noised + here, high)
            tl.store(noised_tokens + here, high_token)


@triton.jit
def part_chunks(
    logits, maxima, tokens, noised, noised_tokens, weights, sure_weights, counts, facts, open_logits, open_tokens,
    temperatures, top_ks, top_ps, min_ps, keys, stride_row, vocab, num_chunks,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of a row with top-k or top-p. Its surely kept tokens are weighed and noised, its open ones written down."""
    row = tl.program_id(0).to(tl.int64)
    here = row * num_chunks + tl.program_id(1)
    begin = tl.program_id(1) * CHUNK
    end = tl.minimum(begin + CHUNK, vocab)
    logits += row * stride_row
    best = merge_chunks(maxima, tokens, row, num_chunks, CHUNKS)[0]
    temperature = tl.load(temperatures + row)
    top_k, top_p = row_filters(top_ks, top_ps, row, vocab, HAS_TOP_K, HAS_TOP_P)
    if (temperature > 0) & (tl.abs(best) < float("inf")) & ((top_k > 0) | (top_p < 1)):
        before, row_counts = count_chunks(counts + row * num_chunks * BINS, num_chunks)
        total = merge_weights(weights, row, num_chunks, CHUNKS)
        lowest, highest, wanted = open_bins(row_counts, top_k, top_p, total)
        is_open_bin = (tl.arange(0, BINS) >= lowest) & (tl.arange(0, BINS) <= highest)
        num_open = tl.sum(tl.where(is_open_bin, row_counts, 0), 0)
        place = tl.sum(tl.where(is_open_bin, before, 0), 0)
        if tl.program_id(1) == 0:
            tl.store(facts + row * 2, num_open)
            tl.store(facts + row * 2 + 1, wanted)
        if num_open <= ROOM:
            least = min_p_score(min_ps, row, HAS_MIN_P)
            key = tl.load(keys + row)
            weight = tl.zeros([], tl.float32)
            high = tl.full([], float("-inf"), tl.float32)
            high_token = tl.zeros([], tl.int32)
            for start in range(begin, end, BLOCK):
                token, scores = row_scores(logits, start, end, best, temperature, BLOCK)
                bin_of = score_bins(scores)
                is_sure = bin_of < lowest
                is_open = (bin_of >= lowest) & (bin_of <= highest)
                if tl.max(is_sure.to(tl.int32), 0) > 0:
                    weight += tl.sum(tl.where(is_sure, tl.exp(scores), 0.0), 0)
                    value = scores + gumbel_noise(key, token.to(tl.int64))
                    high, high_token = better_of(value, token, is_sure & (scores >= least), high, high_token)
                num_here = tl.sum(is_open.to(tl.int32), 0)
                if num_here > 0:
                    at = row * ROOM + place + tl.cumsum(is_open.to(tl.int32), 0) - 1
                    raw = tl.load(logits + token, mask=is_open, other=0.0)
                    tl.store(open_logits + at, raw, mask=is_open)
                    tl.store(open_tokens + at, token, mask=is_open)
                    place += num_here
            tl.store(noised + here, high)
            tl.store(noised_tokens + here, high_token)
            tl.store(sure_weights + here, weight)
