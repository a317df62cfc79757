"""Ops that store into the cache of keys and values, as the model computes them or in 8 bits, and copy its blocks."""

from __future__ import annotations

import torch

from xllm_cpu.device import CpuDevice
from xllm_cpu.ops import _check, _check_index, _check_rotation, _heads, _is_bf16


def _check_cache(new: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    is_right = (
        cache.is_contiguous()
        and cache.shape[2:] == new.shape[1:]
        and slots.shape == (new.shape[0],)
        and slots.dtype == torch.int64
    )
    _check(
        is_right,
        "a cache must be [B, S, ...], contiguous, for new entries [T, ...] and slots [T] int64",
        cache,
        new,
        slots,
    )


class KvWrite:
    """`kv_write`."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(self, new: tuple[torch.Tensor, ...], caches: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
        """new[i]: [T, ...], caches[i]: [B, S, ...], slots: [T] int64; -1 is skipped, IndexError for one outside the cache."""
        slots = slots.contiguous()
        for tensor, cache in zip(new, caches, strict=True):
            self.write(tensor, cache, slots)

    def write(self, tensor: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """One of them."""
        _check_cache(tensor, cache, slots)
        tensor = tensor.to(cache.dtype)
        size = tensor[0].numel() if tensor.shape[0] else 0
        tensor = tensor if tensor.shape[0] and tensor[0].is_contiguous() else tensor.contiguous()
        num_slots = cache.shape[0] * cache.shape[1]
        bad = self._native.kv_write(
            tensor.data_ptr(), tensor.stride(0), cache.data_ptr(), slots.data_ptr(), tensor.shape[0], num_slots, size, cache.element_size()
        )  # fmt: skip
        _check_index(bad, "slot", slots, num_slots)


class RopeKvWrite:
    """`rope_kv_write`: keys are rotated on their way into the cache."""

    _function = "rope_kv_write"

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        caches: tuple[torch.Tensor, ...], slots: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Returns q rotated."""
        cos, sin = _check_rotation(k, cos, sin)
        slots, q, k, v = slots.contiguous(), _heads(q), _heads(k), _heads(v)
        sizes = self._check_caches(k, v, caches, slots)
        is_right = q.shape[::2] == k.shape[::2] and q.dtype == k.dtype == v.dtype
        _check(is_right, "q, k and v must have the same tokens, head size and dtype", q, k, v)
        out = torch.empty(q.shape, dtype=q.dtype)
        num_slots = caches[0].shape[0] * caches[0].shape[1]
        bad = getattr(self._native, self._function)(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
            *(cache.data_ptr() for cache in caches), slots.data_ptr(), k.shape[0], q.shape[1], k.shape[1], *sizes, cos.shape[1], num_slots,
            _is_bf16(k),
        )  # fmt: skip
        _check_index(bad, "slot", slots, num_slots)
        return out

    def _check_caches(
        self, k: torch.Tensor, v: torch.Tensor, caches: tuple[torch.Tensor, ...], slots: torch.Tensor
    ) -> tuple[int, ...]:
        """Refuse those that do not fit; returns elements of a head's keys and of a token's values."""
        keys, values = caches
        _check_cache(k, keys, slots)
        _check_cache(v, values, slots)
        is_right = keys.shape[:2] == values.shape[:2] and k.dtype == keys.dtype == values.dtype
        _check(is_right, "k, v and their caches must have the same slots and dtype", k, keys, values)
        return k.shape[2], v.shape[1] * v.shape[2]


def _check_codes(new: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor, slots: torch.Tensor) -> None:
    _check_cache(new, codes, slots)
    is_right = steps.is_contiguous() and steps.shape == codes.shape[:-1] and new.dim() == 3
    _check(
        is_right and codes.dtype == torch.int8 and steps.dtype == torch.float32,
        "a cache in 8 bits must be int8 [B, S, G, D] and its steps float32 [B, S, G], contiguous, for entries [T, G, D]",
        codes,
        steps,
        new,
    )


class KvWriteInt8:
    """`kv_write_int8`."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(self, new: tuple[torch.Tensor, ...], caches: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
        """new[i]: [T, G, D]; caches: of each the codes [B, S, G, D], then of each the steps [B, S, G]; slots as in `kv_write`."""
        slots = slots.contiguous()
        for tensor, codes, steps in zip(new, caches[: len(new)], caches[len(new) :], strict=True):
            _check_codes(tensor, codes, steps, slots)
            tensor, num_slots = _heads(tensor), codes.shape[0] * codes.shape[1]
            bad = self._native.kv_write_int8(
                tensor.data_ptr(), tensor.stride(0), codes.data_ptr(), steps.data_ptr(), slots.data_ptr(), tensor.shape[0], num_slots,
                *tensor.shape[1:], _is_bf16(tensor),
            )  # fmt: skip
            _check_index(bad, "slot", slots, num_slots)


class RopeKvWriteInt8(RopeKvWrite):
    """`rope_kv_write_int8`: the same into codes of keys, of values, and steps of keys, of values."""

    _function = "rope_kv_write_int8"

    def _check_caches(
        self, k: torch.Tensor, v: torch.Tensor, caches: tuple[torch.Tensor, ...], slots: torch.Tensor
    ) -> tuple[int, ...]:
        """Refuse those that do not fit; returns elements of a head."""
        keys, values, key_steps, value_steps = caches
        _check_codes(k, keys, key_steps, slots)
        _check_codes(v, values, value_steps, slots)
        _check(
            k.shape == v.shape and keys.shape == values.shape,
            "k and v, and their caches, must be alike",
            k,
            v,
            keys,
            values,
        )
        return (k.shape[2],)


class BlockCopy:
    """`block_copy`."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native

    def __call__(self, caches: tuple[torch.Tensor, ...], src: torch.Tensor, dst: torch.Tensor) -> None:
        """caches[i]: [B, S, ...], contiguous, src and dst: [N] int64; IndexError for a block that is not there."""
        src, dst = src.contiguous(), dst.contiguous()
        for cache in caches:
            is_right = cache.is_contiguous() and src.shape == dst.shape and src.dtype == dst.dtype == torch.int64
            _check(
                is_right, "a contiguous cache and as many sources as destinations, int64, are wanted", cache, src, dst
            )
            block_bytes = cache[0].numel() * cache.element_size()
            buffer = torch.empty(src.shape[0] * block_bytes, dtype=torch.uint8)
            bad = self._native.block_copy(
                cache.data_ptr(), src.data_ptr(), dst.data_ptr(), src.shape[0], cache.shape[0], block_bytes, buffer.data_ptr()
            )  # fmt: skip
            if bad:
                raise IndexError(
                    f"copy {bad - 1}, block {int(src[bad - 1])} to {int(dst[bad - 1])}, is outside 0 .. {cache.shape[0] - 1}"
                )
