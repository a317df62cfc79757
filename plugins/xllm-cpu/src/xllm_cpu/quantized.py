"""Linear maps over quantised weights. Sums of 8-bit integers are exact, so every instruction set gives what the reference gives, but for silu."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from xllm_cpu.ops import Linear, Packed, _check, _is_bf16, _rows

_MOST_COLUMNS = 1 << 16  # 255 * 127 times as many fit 32 bits
_BLOCK = 32


class _OverBytes(Linear, ABC):
    """A map whose rows of x become bytes first, in room of their own. Subclasses name the native calls."""

    @abstractmethod
    def _room_bytes(self, columns: int) -> int:
        """Of a row."""

    @abstractmethod
    def _multiply(self, prepared: Packed, x: torch.Tensor, out: torch.Tensor, room: torch.Tensor, is_bf16: int) -> None:
        """x [T, in] to out [T, out]."""

    def __call__(self, x: torch.Tensor, prepared: Packed) -> torch.Tensor:
        """x: [T, in]. Returns [T, out]."""
        n, k = prepared.out_features, prepared.in_features
        is_own = type(prepared) is self._prepared_type and prepared.weight.dtype == torch.uint8
        _check(is_own, f"{type(self).__name__} was given what another op has packed", prepared.weight)
        _check(x.dim() == 2 and x.shape[1] == k, f"x must be [T, {k}]", x)
        is_bf16, x = _is_bf16(x), _rows(x)
        dtype = torch.float32 if self._is_wide else x.dtype
        out = torch.empty(x.shape[0], n // 2 if self._fuses else n, dtype=dtype)
        self._multiply(prepared, x, out, torch.empty(x.shape[0], self._room_bytes(k), dtype=torch.uint8), is_bf16)
        return out


class LinearInt8(_OverBytes):
    """`linear_int8`: products of bytes, a step per output channel and per row of x."""

    def prepare(self, weight: Any, bias: torch.Tensor | None) -> Packed:
        """weight: int8 [out, in] of -127 .. 127, and steps [out] float32. Packed; the tensors given are not kept."""
        values, steps = weight
        is_right = values.dim() == 2 and values.dtype == torch.int8 and steps.dtype == torch.float32
        _check(is_right and steps.shape == values.shape[:1], "int8 [out, in] and steps [out] are wanted", values, steps)
        n, k, native = *values.shape, self._native
        _check(k <= _MOST_COLUMNS, f"sums over {k} columns may not fit 32 bits; at most {_MOST_COLUMNS} do", values)
        _check(not self._fuses or n % 2 == 0, "gate and up must be equally many", values)
        values, steps = values.contiguous(), steps.contiguous()
        packed = self._allocate(native.int8_bytes(n, k, self._fuses), torch.uint8)
        native.pack_int8(values.data_ptr(), steps.data_ptr(), n, k, self._fuses, packed.data_ptr())
        return Packed(packed, self._pack_bias(bias, n), n, k)

    def _room_bytes(self, columns: int) -> int:
        return int(self._native.int8_room(columns))

    def _multiply(self, prepared: Packed, x: torch.Tensor, out: torch.Tensor, room: torch.Tensor, is_bf16: int) -> None:
        bias = prepared.bias.data_ptr() if prepared.bias is not None else None
        self._native.linear_int8(
            x.data_ptr(), prepared.weight.data_ptr(), bias, out.data_ptr(), room.data_ptr(), x.shape[0], prepared.out_features,
            prepared.in_features, x.stride(0), out.shape[1], is_bf16, self._fuses, self._is_wide,
        )  # fmt: skip


class LinearSiluMulInt8(LinearInt8):
    """`linear_silu_mul_int8`: silu(gate(x)) * up(x) for stacked gate and up; nothing is rounded in between."""

    _fuses = 1


class LmHeadInt8(LinearInt8):
    """`lm_head_int8`: sums are scaled, and stay as they are."""

    _is_wide = 1


@dataclass(frozen=True, slots=True)
class PackedBlocks(Packed):
    """A weight in panels of blocks."""

    is_4_bit: bool
    has_minimums: bool


class LinearBlocks(_OverBytes):
    """`linear_blocks`: codes of 4 or 8 bits as the file has them, a scale per 32 columns, a step per 32 elements of x."""

    _prepared_type = PackedBlocks

    def prepare(self, weight: Any, bias: torch.Tensor | None) -> PackedBlocks:
        """weight: uint8 [out, in / 2] or int8 [out, in], scales and for some kinds minimums [out, in / 32] float16. Packed; none is kept."""
        codes, scales, *rest = weight
        is_4_bit, native = codes.dtype == torch.uint8, self._native
        is_right = codes.dim() == 2 and (is_4_bit or codes.dtype == torch.int8) and len(rest) < 2
        _check(is_right, "4-bit codes uint8 [out, in / 2] or 8-bit codes int8 [out, in] are wanted", *weight)
        n, k = codes.shape[0], codes.shape[1] * (2 if is_4_bit else 1)
        _check(k % _BLOCK == 0, f"rows of {k} are not whole blocks of {_BLOCK}", *weight)
        for tensor in (scales, *rest):
            is_right = tensor.shape == (n, k // _BLOCK) and tensor.dtype == torch.float16
            _check(is_right, f"scales and minimums must be [{n}, {k // _BLOCK}] float16", *weight)
        _check(not self._fuses or n % 2 == 0, "gate and up must be equally many", *weight)
        codes, scales = codes.contiguous(), scales.contiguous()
        minimums = rest[0].contiguous() if rest else None
        packed = self._allocate(native.blocks_bytes(n, k, is_4_bit, minimums is not None, self._fuses), torch.uint8)
        native.pack_blocks(
            codes.data_ptr(), scales.data_ptr(), minimums.data_ptr() if minimums is not None else None, n, k, is_4_bit, self._fuses,
            packed.data_ptr(),
        )  # fmt: skip
        return PackedBlocks(packed, self._pack_bias(bias, n), n, k, is_4_bit, minimums is not None)

    def _room_bytes(self, columns: int) -> int:
        return int(self._native.blocks_room(columns))

    def _multiply(self, prepared: Packed, x: torch.Tensor, out: torch.Tensor, room: torch.Tensor, is_bf16: int) -> None:
        assert isinstance(prepared, PackedBlocks)
        bias = prepared.bias.data_ptr() if prepared.bias is not None else None
        self._native.linear_blocks(
            x.data_ptr(), prepared.weight.data_ptr(), bias, out.data_ptr(), room.data_ptr(), x.shape[0], prepared.out_features,
            prepared.in_features, x.stride(0), out.shape[1], is_bf16, prepared.is_4_bit, prepared.has_minimums, self._fuses, self._is_wide,
        )  # fmt: skip


class LinearSiluMulBlocks(LinearBlocks):
    """`linear_silu_mul_blocks`: silu(gate(x)) * up(x) for stacked gate and up; nothing is rounded in between."""

    _fuses = 1


class LmHeadBlocks(LinearBlocks):
    """`lm_head_blocks`: sums stay as they are."""

    _is_wide = 1
