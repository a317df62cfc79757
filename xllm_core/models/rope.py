"""Rotary frequencies of each scaling, computed as transformers computes them: in float32, in the same order."""

from __future__ import annotations

import math
from typing import Any

import torch

from xllm_core.errors import IntegrityError
from xllm_core.models.config import RopeConfig
from xllm_core.plugins.contracts.model import ForwardContext


def inverse_frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """([size / 2] float32 radians per token, factor on cos and sin)."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, rope.size, 2, dtype=torch.int64).float() / rope.size))
    numbers = rope.parameters
    if rope.kind in ("default", "dynamic"):
        # "dynamic" stretches only beyond the context the model was made for, which is as far as we serve: stretching
        # with the length of the moment would turn keys that are cached already.
        return frequencies, 1.0
    if rope.kind == "linear":
        return frequencies / numbers["factor"], 1.0
    if rope.kind == "factors":
        return frequencies / torch.tensor(numbers["factors"], dtype=torch.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(frequencies, **numbers), 1.0
    if rope.kind == "yarn":
        return _yarn(rope), _yarn_attention_factor(**numbers)
    raise IntegrityError(f"rope kind {rope.kind!r} was read but is not computed")


def _llama3(
    frequencies: torch.Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those between blended. Source: Llama 3.1, arXiv:2407.21783."""
    original = original_max_position_embeddings
    wave_lengths = 2 * math.pi / frequencies
    blend = (original / wave_lengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    is_long, is_short = wave_lengths > original / low_freq_factor, wave_lengths < original / high_freq_factor
    return torch.where(is_long, frequencies / factor, torch.where(is_short, frequencies, blended))


def _yarn(rope: RopeConfig) -> torch.Tensor:
    """Blend of kept and stretched frequencies over a ramp of dimensions. Source: YaRN, arXiv:2309.00071."""
    numbers, size = rope.parameters, rope.size

    def dimension(num_rotations: float) -> float:
        original = numbers["original_max_position_embeddings"]
        return size * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(numbers.get("beta_fast", 32.0)), dimension(numbers.get("beta_slow", 1.0))
    if numbers["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # no division by zero
    stretched_share = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    periods: torch.Tensor = rope.theta ** (torch.arange(0, size, 2).float() / size)
    kept_share = 1 - stretched_share
    blended: torch.Tensor = 1.0 / (numbers["factor"] * periods) * (1 - kept_share) + 1.0 / periods * kept_share
    return blended


def _yarn_attention_factor(
    factor: float,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    **_: Any,
) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if attention_factor is not None:
        return attention_factor
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


_TABLE_BYTES = 64 << 20
_SPARE_POSITIONS = 64  # a step that is planned ahead may lie behind the end


class Rotary:
    """cos and sin of a step's positions, found or worked out by the first layer that asks and shared through `ForwardContext.memo`.

    They are worked out once for all positions where that takes no more than 64 MiB, else for each step.
    """

    def __init__(self, rope: RopeConfig, dtype: torch.dtype, torch_device: str) -> None:
        frequencies, self._scale = inverse_frequencies(rope)
        self._frequencies, self._dtype = frequencies.to(torch_device), dtype
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        num_rows = rope.max_positions + _SPARE_POSITIONS
        if rope.max_positions and 2 * num_rows * rope.size * dtype.itemsize <= _TABLE_BYTES:
            self._tables = self._waves(torch.arange(num_rows, device=torch_device))

    def __call__(self, ctx: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [T, size] in the model's dtype, the half repeated."""
        if "rotary" not in ctx.memo:
            ctx.memo["rotary"] = self._at(ctx.positions)
        cos, sin = ctx.memo["rotary"]
        return cos, sin

    def _at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tables is None:
            return self._waves(positions)
        cos, sin = self._tables
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _waves(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.float().unsqueeze(1) * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scale).to(self._dtype), (angles.sin() * self._scale).to(self._dtype)
