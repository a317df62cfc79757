"""Reference numbers behind the names of torch_npu's fused operators.

Each call first runs torch_npu's own host code, whose checks may refuse it and whose outputs have the shapes and dtypes that they have on a chip;
then the outputs are filled with what CANN documents of the operator. What CANN checks on its side is checked here too, as far as it is documented.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, get_kernel

from xllm_ascend_soft.aten import host_view

_library: list[Library] = []


def install() -> None:
    """Put numbers behind the operators below."""
    library = Library("npu", "IMPL")
    _library.append(library)
    for function in (
        npu_rms_norm,
        npu_add_rms_norm,
        npu_swiglu,
        npu_rotary_mul,
        npu_scatter_pa_kv_cache,
        npu_fused_infer_attention_score,
    ):
        _register(library, function)


def _register(library: Library, numbers: Callable[..., tuple[torch.Tensor, ...] | None]) -> None:
    name = numbers.__name__
    overload = getattr(torch.ops.npu, name).default
    host_code = get_kernel(overload, "PrivateUse1")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    names = [argument.name for argument in overload._schema.arguments]
    defaults = {
        argument.name: argument.default_value for argument in overload._schema.arguments if argument.has_default_value()
    }

    def kernel(*args: Any, **kwargs: Any) -> Any:
        answer = host_code.call_boxed(keys, *args, **kwargs)
        values = defaults | dict(zip(names, args, strict=False)) | kwargs
        lowered = {key: _lowered(key, value, name) for key, value in values.items()}
        outputs = numbers(**lowered) or ()
        for output, want in zip(answer if isinstance(answer, tuple) else (answer,), outputs, strict=False):
            assert (output.shape, output.dtype) == (want.shape, want.dtype), (
                f"{name}: {output.shape} {output.dtype}, {want.shape} {want.dtype}"
            )
            host_view(output).copy_(want)
        return answer

    library.impl(name, kernel, "PrivateUse1", allow_override=True)


def _lowered(key: str, value: Any, name: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type != "npu":
        raise RuntimeError(f"{name}: {key} is on {value.device}")
    return host_view(value)


def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, ...]:
    """One rounding at the end, the scale of each row besides."""
    wide = input.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * scale * gamma.float()).to(input.dtype), scale


def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, ...]:
    """Normed, scale, sum."""
    total = x1 + x2
    return (*npu_rms_norm(total, gamma, epsilon), total)


def npu_swiglu(input: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """silu of the first half times the second."""
    gate, up = input.float().chunk(2, dim)
    return ((torch.nn.functional.silu(gate) * up).to(input.dtype),)


def npu_rotary_mul(
    input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str, rotate: Any
) -> tuple[torch.Tensor, ...]:
    """Half-split pairs."""
    if input.dim() != 4 or rotary_mode != "half" or rotate is not None:
        raise RuntimeError(f"npu_rotary_mul: {input.dim()} dimensions, mode {rotary_mode}")
    first, second = input.float().chunk(2, -1)
    return ((input.float() * r1.float() + torch.cat((-second, first), -1) * r2.float()).to(input.dtype),)


def npu_scatter_pa_kv_cache(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slot_mapping: torch.Tensor, *,
    cache_mode: str, **others: Any,
) -> None:  # fmt: skip
    """Entries of tokens into their slots of [block, slot, head, element]; a negative slot is left out."""
    if cache_mode != "Norm" or any(other is not None for other in others.values()):
        raise RuntimeError(f"npu_scatter_pa_kv_cache: cache_mode {cache_mode!r}, {others}")
    for tensor, cache in ((key, key_cache), (value, value_cache)):
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                cache[slot // cache.shape[1], slot % cache.shape[1]] = tensor[token]


def npu_fused_infer_attention_score(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, atten_mask: torch.Tensor, actual_seq_lengths: list[int],
    actual_seq_lengths_kv: list[int], block_table: torch.Tensor, num_heads: int, scale: float, input_layout: str, num_key_value_heads: int,
    sparse_mode: int, block_size: int, **others: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Layout TND over a paged cache [block, slot, heads * elements], causal from the lower right corner (sparse mode 3)."""
    if (input_layout, sparse_mode) != ("TND", 3) or key.shape[1:] != (
        block_size,
        num_key_value_heads * query.shape[-1],
    ):
        raise RuntimeError(
            f"npu_fused_infer_attention_score: {input_layout}, sparse mode {sparse_mode}, cache {tuple(key.shape)}"
        )
    if block_size % 16 or block_size > 128 or not _is_causal(atten_mask):
        raise RuntimeError(f"npu_fused_infer_attention_score: blocks of {block_size}, mask {tuple(atten_mask.shape)}")
    if (
        actual_seq_lengths[-1] != len(query)
        or block_table.shape[0] != len(actual_seq_lengths_kv)
        or block_table.dtype != torch.int32
    ):
        raise RuntimeError(
            f"npu_fused_infer_attention_score: rows end at {actual_seq_lengths} of {len(query)}, table {block_table.shape}"
        )
    out = torch.empty_like(query)
    start = 0
    for row, (end, length) in enumerate(zip(actual_seq_lengths, actual_seq_lengths_kv, strict=True)):
        blocks = block_table[row, : -(-length // block_size)].long()
        k, v = (
            cache[blocks].reshape(-1, num_key_value_heads, query.shape[-1])[:length].float() for cache in (key, value)
        )
        out[start:end] = _attend(query[start:end].float(), k, v, scale).to(query.dtype)
        start = end
    return (out,)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(group, 1).transpose(0, 1) for tensor in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def _is_causal(mask: torch.Tensor) -> bool:
    """Four million elements are looked at once in a while, the corners always."""
    if mask.shape != (2048, 2048) or mask[0, 1] == 0 or mask[-1, 0] or mask[-1, -1]:
        return False
    if next(_calls) % 64:
        return True
    return torch.equal(mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))


_calls = itertools.count()
