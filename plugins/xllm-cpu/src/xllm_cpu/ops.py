"""The core's ops and fusions over native kernels. Each class is built once with its device; calls check shapes, kernels check indices.

Sums are in float32 and rounded once. Every row of a result is the same to the bit whatever other rows are computed with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xllm_cpu.device import CpuDevice
from xllm_cpu.kept import Kept


def _is_bf16(tensor: torch.Tensor) -> int:
    if tensor.dtype == torch.bfloat16:
        return 1
    if tensor.dtype == torch.float32:
        return 0
    raise TypeError(f"{tensor.dtype} is neither float32 nor bfloat16")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With elements of a row side by side; rows may lie apart."""
    return x if x.stride(-1) == 1 or x.numel() <= 1 else x.contiguous()


def _check(is_right: bool, what: str, *tensors: torch.Tensor) -> None:
    """All tensors of a call but those that it makes: kernels follow their pointers."""
    if not is_right:
        raise ValueError(f"{what}: {', '.join(f'{tuple(t.shape)} {t.dtype}' for t in tensors)}")
    for tensor in tensors:
        if not tensor.is_cpu:
            raise ValueError(f"{what}, on the CPU: {tuple(tensor.shape)} {tensor.dtype} is on {tensor.device}")


def _check_index(bad: int, what: str, values: torch.Tensor, limit: int) -> None:
    if bad:
        raise IndexError(f"{what} {int(values[bad - 1])} at {bad - 1} is outside 0 .. {limit - 1}")


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [out, in] in panels, and its bias in their order. gate_up: gate and up alternate by vectors."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    out_features: int
    in_features: int


class Linear(Kept):
    """`linear`: x @ weight.T + bias."""

    _prepared_type = Packed
    _fuses = 0
    _is_wide = 0  # whether results are float32 whatever x is

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native
        self._allocate = device.packed_weight

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        """Pack; the tensors given are not kept."""
        _check(
            weight.dim() == 2 and (weight.shape[0] % 2 == 0 or not self._fuses),
            "a weight must be [out, in], and gate and up together [2I, in]",
            weight,
        )
        n, k, is_bf16, native = *weight.shape, _is_bf16(weight), self._native
        weight = weight.contiguous()
        packed = self._allocate(native.packed_elements(n, k, is_bf16, self._fuses), weight.dtype)
        native.pack(weight.data_ptr(), n, k, is_bf16, self._fuses, packed.data_ptr())
        return Packed(packed, self._pack_bias(bias, n), n, k)

    def _pack_bias(self, bias: torch.Tensor | None, n: int) -> torch.Tensor | None:
        if bias is None:
            return None
        _check(bias.shape == (n,), f"a bias must be [{n}]", bias)
        wide = bias.float().contiguous()
        laid_out = torch.empty(self._native.packed_columns(n, self._fuses), dtype=torch.float32)
        self._native.pack_bias(wide.data_ptr(), n, self._fuses, laid_out.data_ptr())
        return laid_out

    def __call__(self, x: torch.Tensor, prepared: Packed) -> torch.Tensor:
        """x: [T, in]. Returns [T, out]."""
        n, k = prepared.out_features, prepared.in_features
        _check(
            x.dim() == 2 and x.shape[1] == k and x.dtype == prepared.weight.dtype,
            f"x must be [T, {k}] {prepared.weight.dtype}",
            x,
        )
        is_bf16 = _is_bf16(x)
        x = torch.nn.functional.pad(x, (0, 1)) if is_bf16 and k % 2 else _rows(x)  # bfloat16 is read in pairs
        width = n // 2 if self._fuses else n
        out = torch.empty(x.shape[0], width, dtype=torch.float32 if self._is_wide else x.dtype)
        bias = prepared.bias.data_ptr() if prepared.bias is not None else None
        self._native.linear(
            x.data_ptr(), prepared.weight.data_ptr(), bias, out.data_ptr(), x.shape[0], n, k, x.stride(0), width, is_bf16, self._fuses,
            self._is_wide,
        )  # fmt: skip
        return out


class LinearSiluMul(Linear):
    """`linear_silu_mul`: silu(gate(x)) * up(x) for stacked gate and up; nothing is rounded in between."""

    _fuses = 1


class LmHead(Linear):
    """`lm_head`: sums stay as they are. A tied embedding reads its rows (`GivesRows`)."""

    _is_wide = 1

    def rows(self, ids: torch.Tensor, prepared: Packed) -> torch.Tensor:
        """ids: [T] int64. Returns [T, in], to the bit as they were packed; IndexError for an id outside the table."""
        ids, weight = ids.contiguous(), prepared.weight
        _check(ids.dtype == torch.int64 and ids.dim() == 1, "ids [T] int64 are wanted", ids)
        out = torch.empty(ids.shape[0], prepared.in_features, dtype=weight.dtype)
        bad = self._native.packed_rows(
            ids.data_ptr(), weight.data_ptr(), out.data_ptr(), ids.shape[0], prepared.out_features, prepared.in_features, _is_bf16(weight)
        )  # fmt: skip
        _check_index(bad, "token id", ids, prepared.out_features)
        return out


class Embedding:
    """`embedding`."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """ids: [T] int64, weight: [V, H]. Returns [T, H]; IndexError for an id outside the table."""
        ids, weight = ids.contiguous(), weight.contiguous()
        _check(
            ids.dtype == torch.int64 and ids.dim() == 1 and weight.dim() == 2,
            "ids [T] int64 and a table [V, H] are wanted",
            ids,
            weight,
        )
        out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype)
        bad = self._native.embedding(
            ids.data_ptr(), weight.data_ptr(), out.data_ptr(), ids.shape[0], *weight.shape, _is_bf16(weight)
        )  # fmt: skip
        _check_index(bad, "token id", ids, weight.shape[0])
        return out


class RmsNorm:
    """`rms_norm`."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [T, ..., H], weight: [H]."""
        size = x.shape[-1]
        _check(weight.shape == (size,) and weight.dtype == x.dtype, "weight must be [H] like x", x, weight)
        beside, flat = 1, x
        if x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == size:
            beside = x.shape[1]  # heads cut out of what a product gave: tokens lie apart
        elif x.dim() != 2 or x.stride(-1) != 1:
            flat = x.reshape(-1, size).contiguous()
        weight = weight.contiguous()  # held until the call is over
        out = torch.empty(x.shape, dtype=x.dtype)
        self._native.rms_norm(
            flat.data_ptr(), flat.stride(0), beside, weight.data_ptr(), eps, out.data_ptr(), flat.shape[0] * beside, size, _is_bf16(x)
        )  # fmt: skip
        return out


class AddRmsNorm:
    """`add_rms_norm`."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [T, H]. Returns (norm of the sum, the sum)."""
        x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
        is_right = (
            x.dim() == 2
            and x.shape == residual.shape
            and weight.shape == x.shape[1:]
            and x.dtype == residual.dtype == weight.dtype
        )
        _check(is_right, "x and residual must be [T, H], weight [H], of one dtype", x, residual, weight)
        total, out = torch.empty_like(x), torch.empty_like(x)
        self._native.add_rms_norm(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, total.data_ptr(), out.data_ptr(), *x.shape, _is_bf16(x)
        )  # fmt: skip
        return out, total


class SiluMul:
    """`silu_mul`."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [T, 2I]. Returns [T, I]."""
        _check(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, "gate_up must be [T, 2I]", gate_up)
        gate_up, inner = _rows(gate_up), gate_up.shape[1] // 2
        out = torch.empty(gate_up.shape[0], inner, dtype=gate_up.dtype)
        self._native.silu_mul(
            gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), gate_up.shape[0], inner, _is_bf16(gate_up)
        )
        return out


def _check_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    is_right = (
        cos.shape == sin.shape
        and cos.dim() == 2
        and cos.shape[0] == x.shape[0]
        and cos.shape[1] <= x.shape[-1]
        and cos.shape[1] % 2 == 0
    )
    _check(
        is_right and cos.dtype == sin.dtype == x.dtype,
        "cos and sin must be [T, R], R even and at most D, like x [T, heads, D]",
        cos,
        sin,
        x,
    )
    return cos.contiguous(), sin.contiguous()


def _heads(x: torch.Tensor) -> torch.Tensor:
    """[T, heads, D] with the heads of a token side by side; tokens may lie apart."""
    _check(x.dim() == 3, "heads must be [T, heads, D]", x)
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


class Rope:
    """`rope`."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q: [T, Hq, D], k: [T, Hk, D], cos and sin: [T, R]."""
        return self.rotate(q, *_check_rotation(q, cos, sin)), self.rotate(k, *_check_rotation(k, cos, sin))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """One of them; a new tensor, contiguous."""
        x = _heads(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        self._native.rope(
            x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *x.shape, cos.shape[1], _is_bf16(x)
        )  # fmt: skip
        return out
