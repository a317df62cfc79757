"""Formats of weights that the core defines; `contracts.ops` says what ops make of them."""

from __future__ import annotations

import torch

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


def _scales(span: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """most / span and span / most; nothing for what is next to zero, NaN as a step for what is not finite."""
    is_finite, is_zero = span.isfinite(), span < _SMALLEST
    top = torch.full_like(span, most)  # a tensor: by a number some devices multiply with its inverse
    factor = (top / span).masked_fill(is_zero | ~is_finite, 0.0)
    return factor, (span / top).masked_fill(is_zero, 0.0).masked_fill(~is_finite, float("nan"))
