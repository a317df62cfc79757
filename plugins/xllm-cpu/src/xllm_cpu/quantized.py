"""Linear maps over quantised weights. Sums of 8-bit integers are exact, so every instruction set gives what the reference gives, but for silu."""

from __future__ import annotations

from typing import Any

import torch

from xllm_cpu.ops import Linear, Packed, _check, _is_bf16, _rows

_MOST_COLUMNS = 1 << 16  # 255 * 127 times as many fit 32 bits


class LinearInt8(Linear):
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

    def __call__(self, x: torch.Tensor, prepared: Packed) -> torch.Tensor:
        """x: [T, in]. Returns [T, out]."""
        n, k, native = prepared.out_features, prepared.in_features, self._native
        _check(x.dim() == 2 and x.shape[1] == k, f"x must be [T, {k}]", x)
        is_bf16, x = _is_bf16(x), _rows(x)
        width = n // 2 if self._fuses else n
        out = torch.empty(x.shape[0], width, dtype=torch.float32 if self._is_wide else x.dtype)
        room = torch.empty(x.shape[0], native.int8_room(k), dtype=torch.uint8)
        bias = prepared.bias.data_ptr() if prepared.bias is not None else None
        native.linear_int8(
            x.data_ptr(), prepared.weight.data_ptr(), bias, out.data_ptr(), room.data_ptr(), x.shape[0], n, k, x.stride(0), width, is_bf16,
            self._fuses, self._is_wide,
        )  # fmt: skip
        return out


class LinearSiluMulInt8(LinearInt8):
    """`linear_silu_mul_int8`: silu(gate(x)) * up(x) for stacked gate and up; nothing is rounded in between."""

    _fuses = 1


class LmHeadInt8(LinearInt8):
    """`lm_head_int8`: sums are scaled, and stay as they are."""

    _is_wide = 1
