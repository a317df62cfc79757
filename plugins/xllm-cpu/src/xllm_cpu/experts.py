"""What only models with experts ask for: the router's map, its choice, and the experts themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xllm_cpu.device import CpuDevice
from xllm_cpu.kept import Kept
from xllm_cpu.ops import Linear, Packed, _check, _check_index, _is_bf16, _rows


class LinearFloat32(Kept):
    """`linear_float32`: scores in float32 whatever the model computes in."""

    _prepared_type = Packed

    def __init__(self, device: CpuDevice) -> None:
        self._linear, self._native = Linear(device), device.native

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        """float32, packed."""
        return self._linear.prepare(weight.float(), bias)

    def __call__(self, x: torch.Tensor, prepared: Packed) -> torch.Tensor:
        """x: [T, in]. Returns [T, out] float32."""
        if x.dtype == torch.bfloat16 and x.dim() == 2:
            _check(True, "x must be", x)
            x = self._widened(_rows(x))
        return self._linear(x, prepared)

    def _widened(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=torch.float32)
        self._native.widen(x.data_ptr(), x.stride(0), out.data_ptr(), *x.shape)
        return out


class MoeRoute:
    """`moe_route`: row by row; scores are not kept."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(
        self, scores: torch.Tensor, correction: torch.Tensor, top_k: int, num_groups: int, top_groups: int, is_normalised: bool, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """scores: [T, E] float32, correction: [E] float32. Returns (ids [T, K] int64, weights [T, K] float32)."""
        is_right = scores.dim() == 2 and scores.shape[1] > 0 and correction.shape == scores.shape[1:]
        _check(
            is_right and scores.dtype == correction.dtype == torch.float32,
            "scores must be [T, E] and correction [E], both float32",
            scores,
            correction,
        )
        num_experts = scores.shape[1]
        size = num_experts // num_groups if num_groups > 0 else 0
        is_possible = (
            size * num_groups == num_experts and 1 <= top_groups <= num_groups and 1 <= top_k <= top_groups * size
        )
        if not is_possible or (top_groups < num_groups and size < 2):
            raise ValueError(
                f"{top_k} experts in the best {top_groups} of {num_groups} equal groups of {num_experts} cannot be chosen"
            )
        scores, correction = _rows(scores), correction.contiguous()
        ids = torch.empty(scores.shape[0], top_k, dtype=torch.int64)
        weights = torch.empty(ids.shape, dtype=torch.float32)
        self._native.moe_route(
            scores.data_ptr(), scores.stride(0), correction.data_ptr(), ids.data_ptr(), weights.data_ptr(), scores.shape[0], num_experts,
            top_k, num_groups, top_groups, is_normalised, scaling,
        )  # fmt: skip
        return ids, weights


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Weights of E experts, one after the other in panels."""

    gate_up: torch.Tensor
    down: torch.Tensor
    num_experts: int
    hidden: int
    inner: int


class MoeExperts(Kept):
    """`moe_experts`: tokens grouped by expert, each weight read once."""

    _prepared_type = PackedExperts

    def __init__(self, device: CpuDevice) -> None:
        self._native, self._allocate = device.native, device.packed_weight

    def prepare(self, gate_up: torch.Tensor, down: torch.Tensor) -> PackedExperts:
        """gate_up: [E, 2I, H], down: [E, H, I]; neither is kept."""
        num_experts, hidden, inner = down.shape
        _check(
            gate_up.shape == (num_experts, 2 * inner, hidden) and gate_up.dtype == down.dtype,
            "gate_up must be [E, 2I, H] and down [E, H, I], of one dtype",
            gate_up,
            down,
        )
        return PackedExperts(self._pack(gate_up, 1), self._pack(down, 0), num_experts, hidden, inner)

    def _pack(self, weight: torch.Tensor, fuses: int) -> torch.Tensor:
        num_experts, n, k = weight.shape
        is_bf16, weight = _is_bf16(weight), weight.contiguous()
        size = self._native.packed_elements(n, k, is_bf16, fuses)
        packed = self._allocate(num_experts * size, weight.dtype).view(num_experts, size)
        for expert in range(num_experts):
            self._native.pack(weight[expert].data_ptr(), n, k, is_bf16, fuses, packed[expert].data_ptr())
        return packed

    def __call__(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, prepared: PackedExperts
    ) -> torch.Tensor:
        """x: [T, H], ids: [T, K] int64 below E or -1, weights: [T, K] float32, counts: [E] int64. Returns [T, H]."""
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        is_right = (
            x.shape == (ids.shape[0], prepared.hidden)
            and x.dtype == prepared.down.dtype
            and weights.shape == ids.shape
            and ids.dim() == 2
        )
        is_typed = (
            ids.dtype == counts.dtype == torch.int64 and weights.dtype == torch.float32 and counts.is_contiguous()
        )
        _check(
            is_right and is_typed and counts.shape == (prepared.num_experts,),
            "x, ids, weights or counts do not fit",
            x,
            ids,
            weights,
            counts,
        )
        out = torch.empty_like(x)
        bad = self._native.experts(
            x.data_ptr(), ids.data_ptr(), weights.data_ptr(), counts.data_ptr(), prepared.gate_up.data_ptr(), prepared.down.data_ptr(),
            out.data_ptr(), *ids.shape, prepared.num_experts, prepared.hidden, prepared.inner, _is_bf16(x),
        )  # fmt: skip
        _check_index(bad, "expert", ids.flatten(), prepared.num_experts)
        return out
