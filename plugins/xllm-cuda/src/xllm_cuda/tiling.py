"""Sizes of tiles, from shapes alone: read by what launches kernels and by what compiles them ahead of time. No torch, no triton."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_SIZE = 256
MAX_GROUP = 128
WIDE_SPLITS = 16
"""A split of a wide tile is so many times that of a narrow one: it has work for a whole processor in its queries."""
GRAPH_PROGRAMS = 2048
"""Of a launch whose grid cannot change, at most: more than any chip runs at once, and few enough that those which find nothing cost little."""


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class AttentionTiling:
    """One shape of tile. block_m: score rows (queries times heads of a group), block_n: keys in a step, block_d: padded head size.

    queries: per tile. split: keys in a split. precision: of float32 products, which are exact ("ieee"): the tensor cores' TF32 would not be.
    """

    block_m: int
    block_n: int
    block_d: int
    queries: int
    split: int
    precision: str
    num_warps: int
    num_stages: int


def attention_tilings(
    group: int, head_size: int, dtype: str, *, kv_split_tokens: int
) -> tuple[AttentionTiling, AttentionTiling]:
    """(narrow, wide). Matrix units want at least 16 score rows; a group larger than a tile makes the tile larger."""
    block_d = max(16, next_power_of_2(head_size))
    is_float32 = dtype == "float32"
    narrow, wide = max(16, next_power_of_2(group)), max(32 if is_float32 else 64, next_power_of_2(group))
    # What a step holds in shared memory and registers grows with the head and with the dtype.
    narrow_keys = 32 if is_float32 or block_d > 128 else 64
    if is_float32:
        wide_keys = 16 if block_d > 64 else 32
    else:
        wide_keys = 32 if block_d > 128 else 64
    stages = 1 if is_float32 else 2

    def tiling(block_m: int, keys: int, split: int) -> AttentionTiling:
        return AttentionTiling(
            block_m=block_m, block_n=min(keys, split), block_d=block_d, queries=block_m // group, split=split,
            precision="ieee" if is_float32 else "tf32", num_warps=4 if block_m <= 64 else 8, num_stages=stages,
        )  # fmt: skip

    return tiling(narrow, narrow_keys, kv_split_tokens), tiling(wide, wide_keys, WIDE_SPLITS * kv_split_tokens)


@dataclass(frozen=True, slots=True)
class RowTiling:
    """rows: in one program, block: columns of it, a power of two."""

    rows: int
    block: int
    num_warps: int


def norm_tiling(size: int) -> RowTiling:
    """Whole rows, and several of them where they are short: heads of 128 elements would leave most of a program idle."""
    block = next_power_of_2(size)
    rows = max(1, 1024 // block)
    return RowTiling(rows, block, num_warps=4 if block <= 4096 else 8)


def gate_tiling(size: int) -> RowTiling:
    """Rows in pieces of a thousand."""
    block = min(1024, next_power_of_2(size))
    return RowTiling(max(1, 1024 // block), block, num_warps=4)


def entry_tiling(size: int) -> RowTiling:
    """One token's entry, in one piece if it is not long."""
    return RowTiling(1, min(1024, next_power_of_2(size)), num_warps=4)


def copy_tiling(num_words: int) -> RowTiling:
    """One block of one tensor in pieces of 4 KiB."""
    return RowTiling(1, min(1024, next_power_of_2(num_words)), num_warps=4)


@dataclass(frozen=True, slots=True)
class RopeTiling:
    """heads: of one program, programs: of one token. pairs, rest, elements: rotated pairs, what is not rotated (0 for nothing) and the whole
    head, padded to powers of two.
    """

    heads: int
    programs: int
    pairs: int
    rest: int
    elements: int
    num_warps: int


def rope_tiling(num_heads: int, num_kv_heads: int, head_size: int, rotated: int, *, writes_kv: bool) -> RopeTiling:
    """About two thousand elements to a program."""
    total = num_heads + num_kv_heads * (2 if writes_kv else 1)
    elements, rest = next_power_of_2(head_size), head_size - rotated
    heads = min(next_power_of_2(total), max(1, 2048 // elements))
    return RopeTiling(
        heads, -(-total // heads), next_power_of_2(max(1, rotated // 2)), next_power_of_2(rest) if rest else 0, elements, num_warps=4
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplerTiling:
    """chunk: tokens of one program. block, wide_block: read at a time, where that takes many registers and where few.

    room: tokens of a row that one program can be left with. num_warps: of a chunk, row_warps: of a row.
    """

    chunk: int
    block: int
    wide_block: int
    room: int
    num_warps: int
    row_warps: int


def sampler_tiling(vocab_size: int) -> SamplerTiling:
    """Chunks that give every processor work at a few rows. A block times sixteen digits must fit into registers: a wider block spilled."""
    padded = next_power_of_2(vocab_size)
    chunk = max(1024, min(8192, padded))
    return SamplerTiling(
        chunk, block=512, wide_block=min(4096, chunk), room=min(16384, padded), num_warps=8, row_warps=16
    )  # fmt: skip
