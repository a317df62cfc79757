"""The core's ops on a GPU. Products and table look-ups are torch's own (cuBLAS); the rest are the kernels next door.

Each class is built once with its device; `xllm_core.plugins.CORE_OPS` and the contract's table say what its call takes.
"""

from __future__ import annotations

import torch

from xllm_core.plugins import DeviceBackend
from xllm_cuda.kernels.activation import silu_mul_rows
from xllm_cuda.kernels.cache import copy_rows, write_entries
from xllm_cuda.kernels.norm import add_rms_norm_rows, rms_norm_rows
from xllm_cuda.kernels.rope import rope_heads
from xllm_cuda.tiling import copy_tiling, entry_tiling, gate_tiling, norm_tiling, rope_tiling


class RmsNorm:
    """`rms_norm`: rows of any length, also those of heads that lie inside a larger row."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [T, ..., H]. Two strides tell where a row begins, so that no view of two or three dimensions is copied."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.dim() > 3 or x.stride(-1) != 1:
            x = x.contiguous().view(-1, x.shape[-1])
        inner = x.shape[1] if x.dim() == 3 else 1
        num_rows, size = x.numel() // x.shape[-1], x.shape[-1]
        tiling = norm_tiling(size)
        rms_norm_rows[(-(-num_rows // tiling.rows),)](
            x, weight, out, num_rows, size, eps, x.stride(0), x.stride(1) if x.dim() == 3 else 0,
            inner, tiling.rows, tiling.block, num_warps=tiling.num_warps,
        )  # fmt: skip
        return out


class AddRmsNorm:
    """`add_rms_norm`: one pass over the residual stream."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [T, H]."""
        x, residual = _with_dense_rows(x), _with_dense_rows(residual)
        out, total = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(x.shape, dtype=x.dtype, device=x.device),
        )
        tiling = norm_tiling(x.shape[-1])
        add_rms_norm_rows[(-(-len(x) // tiling.rows),)](
            x, residual, weight, out, total, *x.shape, eps, x.stride(0), residual.stride(0),
            tiling.rows, tiling.block, num_warps=tiling.num_warps,
        )  # fmt: skip
        return out, total


class Rope:
    """`rope`: queries and keys in one launch."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q: [T, Hq, D], k: [T, Hk, D]; R of cos and sin may be less than D."""
        q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        _rotate(q, k, k, q_out, k_out, k_out, cos, sin, None)
        return q_out, k_out


class RopeKvWrite:
    """The fusion `rope_kv_write`: keys go rotated, and values as they are, straight into the cache."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        caches: tuple[torch.Tensor, ...], slots: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """As `rope` and `kv_write`; returns q rotated."""
        q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _rotate(q, k, v, q_out, caches[0], caches[1], cos, sin, slots)
        return q_out


def _rotate(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor, v_out: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor | None,
) -> None:  # fmt: skip
    """One launch over all heads of all tokens. slots: None where k_out is a plain tensor, else k_out and v_out are caches."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = _with_dense_rows(cos), _with_dense_rows(sin)
    if cos.stride(0) != sin.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads, writes_kv = k.shape[1], slots is not None
    tiling = rope_tiling(num_heads, num_kv_heads, head_size, cos.shape[-1], writes_kv=writes_kv)
    cache_strides = k_out.stride()[:3] if writes_kv else (0, 0, 0)
    rope_heads[(num_tokens, tiling.programs)](
        q, k, v, q_out, k_out, v_out, cos, sin, slots if slots is not None else q,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), *cache_strides,
        num_heads, num_kv_heads, head_size, cos.shape[-1] // 2, k_out.shape[1] if writes_kv else 1,
        tiling.heads, tiling.pairs, tiling.rest, writes_kv, tiling.elements, num_warps=tiling.num_warps,
    )  # fmt: skip


class SiluMul:
    """`silu_mul`."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [T, 2I]."""
        gate_up = _with_dense_rows(gate_up)
        num_rows, size = len(gate_up), gate_up.shape[-1] // 2
        out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
        tiling = gate_tiling(size)
        silu_mul_rows[(-(-num_rows // tiling.rows), -(-size // tiling.block))](
            gate_up, out, num_rows, size, gate_up.stride(0), tiling.rows, tiling.block, num_warps=tiling.num_warps
        )
        return out


class KvWrite:
    """`kv_write` into caches whose entries lie together ("BSGD")."""

    def __init__(self, device: DeviceBackend) -> None:
        pass

    def __call__(self, new: tuple[torch.Tensor, ...], caches: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
        """new[i]: [T, ...], caches[i]: [B, S, ...], slots: [T] int64."""
        for tensor, cache in zip(new, caches, strict=True):
            if tensor.dim() != 3 or tensor.stride(-1) != 1:
                tensor = tensor.contiguous().view(len(tensor), 1, -1)
            size = tensor.shape[1] * tensor.shape[2]
            tiling = entry_tiling(size)
            write_entries[(len(tensor), -(-size // tiling.block))](
                tensor, cache, slots, size, tensor.shape[2], *tensor.stride()[:2], *cache.stride()[:2],
                cache.shape[1], tiling.block, num_warps=tiling.num_warps,
            )  # fmt: skip


class BlockCopy:
    """`block_copy`: two launches for all layers together. Sources are read into a buffer before any destination is written."""

    def __init__(self, device: DeviceBackend) -> None:
        self._device = device

    def __call__(self, caches: tuple[torch.Tensor, ...], src: torch.Tensor, dst: torch.Tensor) -> None:
        """caches[i]: [B, S, ...], src and dst: [N] int64 block ids."""
        by_size: dict[int, list[torch.Tensor]] = {}
        for cache in caches:
            by_size.setdefault(cache[0].nbytes, []).append(cache)
        for num_bytes, tensors in by_size.items():
            if num_bytes % 4:
                for cache in tensors:  # blocks of a few bytes are no case for a kernel of words
                    cache.index_copy_(0, dst, cache.index_select(0, src))
                continue
            addresses = self._device.to_device(torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64))
            buffer = torch.empty((len(src), len(tensors), num_bytes // 4), dtype=torch.int32, device=src.device)
            tiling = copy_tiling(num_bytes // 4)
            grid = (len(src), len(tensors), -(-buffer.shape[-1] // tiling.block))
            for rows, is_first in ((src, True), (dst, False)):
                copy_rows[grid](
                    addresses,
                    buffer,
                    rows,
                    buffer.shape[-1],
                    len(tensors),
                    is_first,
                    tiling.block,
                    num_warps=tiling.num_warps,
                )


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    """A view whose rows may lie apart, but whose elements lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()
