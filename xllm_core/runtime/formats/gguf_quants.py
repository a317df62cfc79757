"""Unpacking GGUF tensors, vectorised over blocks. Block layouts: ggml project, `ggml-common.h`; each is tested against the `gguf` package.

A block holds 32 values: a float16 scale `d`, for the "_1" kinds a float16 minimum `m`, then the packed integers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf.constants import GGMLQuantizationType

_BLOCK = 32


def _half(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """The float16 at byte `first` of each block, as [blocks, 1] float32."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[blocks, 16] bytes -> [blocks, 32] float32: all low halves, then all high halves."""
    values = torch.empty(len(packed), _BLOCK)
    values[:, :16] = packed & 0x0F
    values[:, 16:] = packed >> 4
    return values


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    blocks = raw.view(-1, 18)
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks, 0))


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    blocks = raw.view(-1, 20)
    return _nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    blocks = raw.view(-1, 34)
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_half(blocks, 0))


_UNPACK: dict[GGMLQuantizationType, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    GGMLQuantizationType.F32: ("float32", lambda raw: raw.view(torch.float32)),
    GGMLQuantizationType.F16: ("float16", lambda raw: raw.view(torch.float16)),
    GGMLQuantizationType.BF16: ("bfloat16", lambda raw: raw.view(torch.bfloat16)),
    GGMLQuantizationType.Q4_0: ("float32", _q4_0),
    GGMLQuantizationType.Q4_1: ("float32", _q4_1),
    GGMLQuantizationType.Q8_0: ("float32", _q8_0),
}


def unpack(raw: torch.Tensor, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> torch.Tensor:
    """raw: [bytes] uint8, packed. Returns `shape`, float32 for quantised kinds, else the stored dtype; may alias `raw`."""
    return _UNPACK[kind][1](raw).view(shape)
