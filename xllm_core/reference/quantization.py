"""Formats of weights that the core defines; `contracts.ops` says what ops make of them."""

from __future__ import annotations

import torch

_SMALLEST = 2.0**-100
_TILE_ROWS = 2048


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers of -127 .. 127 in float32, like x [N, K], and the step of each row, [N, 1] float32; NaN for one that is not finite."""
    wide = x.float()
    top = wide.abs().amax(1, keepdim=True) if wide.shape[1] else wide.new_zeros(len(wide), 1)
    is_finite, is_zero = top.isfinite(), top < _SMALLEST
    most = torch.full_like(top, 127.0)  # a tensor: by a number some devices multiply with its inverse
    factor = torch.where(is_zero | ~is_finite, 0.0, most / top)
    step = torch.where(is_zero, 0.0, top / most).masked_fill(~is_finite, float("nan"))
    return (wide.masked_fill(~is_finite, 0.0) * factor).round(), step


class Int8:
    """Symmetric 8-bit integers with one step per output channel."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weight: [out, in]. Returns int8 [out, in] and steps [out] float32; widened a tile at a time."""
        values, steps = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
        for start in range(0, len(weight), _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            tile, step = int8_rows(weight[rows])
            values[rows], steps[rows] = tile.to(torch.int8), step[:, 0]
        return values, steps
