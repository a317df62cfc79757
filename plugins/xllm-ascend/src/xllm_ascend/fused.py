"""The core's ops by torch_npu's fused operators.

Each class is built once with its device; `xllm_core.plugins.CORE_OPS` and the contract's table say what its call takes.
"""

from __future__ import annotations

import torch
import torch_npu

from xllm_core.plugins import DeviceBackend


class RmsNorm:
    """`rms_norm`."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [T, ..., H]."""
        normed: torch.Tensor = torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]
        return normed


class AddRmsNorm:
    """`add_rms_norm`."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [T, H]."""
        normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)
        return normed, total


class Rope:
    """`rope`: half-split pairs. The operator wants four dimensions, here one batch of T tokens."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q: [T, Hq, D], k: [T, Hk, D]; R of cos and sin may be less than D."""
        cos, sin = cos[None, :, None], sin[None, :, None]
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [T, H, D]; cos, sin: [1, T, 1, R]."""
    size = cos.shape[-1]
    rotated: torch.Tensor = torch_npu.npu_rotary_mul(x[None, ..., :size], cos, sin, rotary_mode="half")[0]
    return rotated if size == x.shape[-1] else torch.cat((rotated, x[..., size:]), -1)


class SiluMul:
    """`silu_mul`."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [T, 2I]."""
        out: torch.Tensor = torch_npu.npu_swiglu(gate_up, dim=-1)
        return out


class KvWrite:
    """`kv_write` into caches whose entries lie together ("BSGD"), two caches to a call."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, new: tuple[torch.Tensor, ...], caches: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
        """new[i]: [T, G, D], caches[i]: [B, S, G, D], slots: [T] int64, -1 for a token that is not stored.

        The operator's own default is the tiled layout of the matrix units ("PA_NZ"); "Norm" is the plain one that attention reads here.
        """
        keys, values = new
        torch_npu.npu_scatter_pa_kv_cache(
            keys.contiguous(), values.contiguous(), *caches, slots.int(), cache_mode="Norm"
        )
