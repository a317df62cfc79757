"""Formats of weights that the core defines; `contracts.ops` says what ops make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm_core.plugins.contracts.ops import BLOCK_COLUMNS
from xllm_core.plugins.contracts.weights import PackedTensor

_SMALLEST = 2.0**-100
_TILE_ROWS = 2048


class Int8:
    """Symmetric 8-bit integers with one step per output channel."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weight: [out, in]. Returns int8 [out, in] and steps [out] float32; widened a tile at a time."""
        values, steps = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
        for start in range(0, len(weight), _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            tile = weight[rows].float()
            factor, step = _scales(tile.abs().amax(1, keepdim=True), 127.0)
            values[rows], steps[rows] = (tile * factor).round().to(torch.int8), step[:, 0]
        return values, steps


class Gguf:
    """`PackedQuantization`: blocks of 32 as GGUF files hold them. Layouts: ggml project, `ggml-common.h`."""

    def stack(self, tensors: Sequence[PackedTensor]) -> tuple[torch.Tensor, ...]:
        """Codes, scales and for some kinds minimums, as `contracts.ops` has them. Several kinds become 8-bit codes, which hold them all exactly."""
        kinds = {tensor.kind for tensor in tensors}
        parts = [_parted(tensor, is_alone=len(kinds) == 1) for tensor in tensors]
        if len({len(part) for part in parts}) > 1:
            parts = [part if len(part) == 3 else (*part, torch.zeros_like(part[1])) for part in parts]
        return tuple(torch.cat(same) if len(same) > 1 else same[0] for same in zip(*parts, strict=True))


def _parted(tensor: PackedTensor, *, is_alone: bool) -> tuple[torch.Tensor, ...]:
    """Codes [rows, ...], scales and minimums [rows, blocks]; 4-bit codes stay packed where no other kind is beside them."""
    blocks, has_minimums = tensor.blocks, tensor.kind == "Q4_1"
    heads = [
        blocks[..., first : first + 2].contiguous().view(torch.float16)[..., 0]
        for first in ((0, 2) if has_minimums else (0,))
    ]
    codes = blocks[..., 2 * len(heads) :].flatten(1)
    if tensor.kind == "Q8_0":
        codes = codes.view(torch.int8)
    elif not is_alone:
        codes = unpacked_4_bit(codes, has_minimums=has_minimums)
    return codes, *heads


def unpacked_4_bit(codes: torch.Tensor, *, has_minimums: bool) -> torch.Tensor:
    """uint8 [out, in / 2] -> int8 [out, in]: 0 .. 15 beside a minimum, else -8 .. 7."""
    halves = codes.view(len(codes), -1, 1, BLOCK_COLUMNS // 2)
    values = torch.cat((halves & 15, halves >> 4), 2).flatten(1).to(torch.int8)
    return values if has_minimums else values - 8


def block_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of activations as whole numbers from -127 to 127, float32 [T, blocks, 32]; and the step of each block, [T, blocks] float32.

    A block that is not finite has step NaN.
    """
    wide = x.float().reshape(len(x), x.shape[1] // BLOCK_COLUMNS, BLOCK_COLUMNS)
    factor, step = _scales(wide.abs().amax(2, keepdim=True), 127.0)
    return (wide * factor).round().masked_fill(step.isnan(), 0.0), step[..., 0]


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of activations as unsigned bytes less their zero point, in float32, like x [T, in]; and the step of each, [T, 1] float32.

    A row whose range is not finite has step NaN.
    """
    wide = x.float()
    low, high = wide.amin(1, keepdim=True).clamp(max=0.0), wide.amax(1, keepdim=True).clamp(min=0.0)
    factor, step = _scales(high - low, 255.0)
    zero = (-low * factor).round()
    values = ((wide * factor).round() + zero).clamp(max=255.0) - zero
    return values.masked_fill(step.isnan(), 0.0), step


def int8_entries(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values [..., D] as int8 codes and the step of each last axis, [...] float32; NaN for one that is not finite, with codes 0."""
    wide = x.float()
    factor, step = _scales(wide.abs().amax(-1, keepdim=True), 127.0)
    return (wide * factor).round().masked_fill(step.isnan(), 0.0).to(torch.int8), step[..., 0]


def _scales(span: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """most / span and span / most; nothing for what is next to zero, NaN as a step for what is not finite."""
    is_finite, is_zero = span.isfinite(), span < _SMALLEST
    top = torch.full_like(span, most)  # a tensor: by a number some devices multiply with its inverse
    factor = (top / span).masked_fill(is_zero | ~is_finite, 0.0)
    return factor, (span / top).masked_fill(is_zero, 0.0).masked_fill(~is_finite, float("nan"))
