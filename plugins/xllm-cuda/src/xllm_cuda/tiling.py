"""Sizes of tiles, from shapes alone: read by what launches kernels and by what compiles them ahead of time. No torch, no triton."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_SIZE = 256
WIDE_SPLITS = 16
"""A split of a wide tile is so many times that of a narrow one: it has work for a whole processor in its queries."""


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
    wide_keys = 16 if is_float32 and block_d > 64 else 32
    stages = 1 if is_float32 else 2

    def tiling(block_m: int, keys: int, split: int) -> AttentionTiling:
        return AttentionTiling(
            block_m=block_m, block_n=min(keys, split), block_d=block_d, queries=block_m // group, split=split,
            precision="ieee" if is_float32 else "tf32", num_warps=4 if block_m <= 64 else 8, num_stages=stages,
        )  # fmt: skip

    return tiling(narrow, narrow_keys, kv_split_tokens), tiling(wide, wide_keys, WIDE_SPLITS * kv_split_tokens)
