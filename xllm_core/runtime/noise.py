"""Sampling noise as a pure function of (seed, sequence index, absolute position, token id): counter-based, without generator state.

Replays, forks, preemptions and failovers therefore continue the very noise they would have seen. The generator is SplitMix64
(Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), which is counter-based by construction: output i
of stream `key` is mix(key + i * golden gamma).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def stream_key(seed: int, index: int, position: int) -> int:
    """The stream of one sample, as a signed 64-bit integer. Each argument is mixed before the next is added, so none can stand in for another."""
    key = _mix((seed + _GAMMA) & _MASK)
    key = _mix((key + index + _GAMMA) & _MASK)
    return _signed(_mix((key + position + _GAMMA) & _MASK))


def stream_keys(seeds: Sequence[int], indices: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """`stream_key` for S samples: [S] int64."""
    return torch.tensor(
        [stream_key(s, i, p) for s, i, p in zip(seeds, indices, positions, strict=True)], dtype=torch.int64
    )


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right of int64; torch's own is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for tokens of streams.

    keys: [S, 1] int64. token_ids: int64, broadcastable against keys. Returns float32 of the broadcast shape. argmax(logits + noise) is a
    draw from softmax(logits); the noise of a token is the same whichever other tokens are asked for.
    """
    z = keys + (token_ids + 1) * _signed(_GAMMA)
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    z = z ^ _shift(z, 31)
    # 53 bits, centred: never 0 and never 1, and fine enough near 0 where the largest noise comes from.
    # float32 would round what is closest to 1 up to 1, whose noise is -inf and less than that of a forbidden token.
    uniform = (_shift(z, 11).to(torch.float64) + 0.5).mul_(2.0**-53).to(torch.float32).clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))
