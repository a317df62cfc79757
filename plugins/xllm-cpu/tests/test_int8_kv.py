"""A cache in 8 bits: codes and steps are those of the definition to the bit, and what attention makes of them is as good as float32."""

from __future__ import annotations

import pytest
import torch
from xllm_cpu.attention import PagedAttention
from xllm_cpu.cache_ops import KvWriteInt8, RopeKvWriteInt8
from xllm_cpu.device import CpuDevice
from xllm_cpu.ops import Rope

from xllm_core.plugins import AttentionGeometry, BatchLayout, KVSegments
from xllm_core.reference.ops import KvWriteInt8 as Definition
from xllm_core.reference.quantization import int8_entries


def caches(num_slots: int, heads: int, size: int) -> tuple[torch.Tensor, ...]:
    """Filled with what no entry is."""
    shape = (1, num_slots, heads, size)
    codes = [torch.full(shape, -128, dtype=torch.int8) for _ in range(2)]
    return (*codes, *(torch.full(shape[:3], -1.0) for _ in range(2)))


def entries(tokens: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """With ties, zeros, one large number, next to nothing, infinity and NaN among them."""
    made = torch.randn(tokens, heads, size) * torch.logspace(-20, 20, tokens).view(-1, 1, 1)
    made[0], made[1], made[2, 0, 0], made[3, :, -1], made[4, 0] = 0, 2.0**-110, float("inf"), float("nan"), 1.0
    made[5, 0], made[6, 0, 0] = torch.arange(size) - 0.5, 127.0
    made[6, 0, 1:] = torch.arange(size - 1) % 8 + 0.5  # halves of a step, which go to even
    return made.to(dtype)


@pytest.mark.parametrize("size", [8, 33, 64])
def test_codes_of_the_definition(device: CpuDevice, dtype: torch.dtype, size: int) -> None:
    """By both ops, for slots in any order, one skipped. Dies with another rounding, a step of 1 / 128, or codes of what is not finite."""
    torch.manual_seed(size)
    k, v, q = (entries(20, heads, size, dtype) for heads in (3, 3, 6))
    slots = torch.randperm(24)[:20]
    slots[7] = -1
    wanted, found = caches(24, 3, size), caches(24, 3, size)
    Definition(device)((k, v), wanted, slots)
    KvWriteInt8(device)((k, v), found, slots)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert int(wanted[2].isnan().sum()) > 0
    angles = torch.rand(20, size // 2 * 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotated, keys = Rope(device)(q, k, cos, sin)
    apart, fused = caches(24, 3, size), caches(24, 3, size)
    KvWriteInt8(device)((keys, v), apart, slots)
    out = RopeKvWriteInt8(device)(q, k, v, cos, sin, fused, slots)
    for a, b in zip((out, *fused), (rotated, *apart), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("head_size", "heads"), [(64, (9, 3)), (128, (8, 1)), (33, (2, 2)), (512, (1, 1))])
def test_error_beside_that_of_8_bits(device: CpuDevice, head_size: int, heads: tuple[int, int]) -> None:
    """700 positions of which some have keys and values a thousand times as large: what the kernel adds is a thirtieth of what codes cost at most.

    Dies with 8-bit queries or weights, and a step taken of a neighbour.
    """
    torch.manual_seed(head_size)
    length, size = 700, 16
    num_blocks = -(-length // size)
    spread = torch.where(torch.rand(num_blocks, size, 1, 1) < 0.05, 3.0, 1.0)
    k, v = (torch.randn(num_blocks, size, heads[1], head_size) * spread for _ in range(2))
    v[3] *= 1000
    (k_codes, k_steps), (v_codes, v_steps) = int8_entries(k), int8_entries(v)
    geometry = AttentionGeometry(
        num_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, scale=head_size**-0.5, block_size=size, dtype="float32", kv_dtype="int8",
    )  # fmt: skip
    kernel = PagedAttention(device, geometry)
    for first in (0, length - 1):  # a prompt, a token
        q = torch.randn(length - first, heads[0], head_size)
        given = [torch.tensor(value, dtype=torch.int32) for value in ([len(q)], [length], [0, len(q)])]
        batch = BatchLayout(*given, torch.arange(num_blocks, dtype=torch.int32).view(1, -1))
        out = torch.empty_like(q)
        kernel.run(q, KVSegments(own=(k_codes, v_codes, k_steps, v_steps)), kernel.plan(batch), out)
        coarse = attended(q, k_codes * k_steps.unsqueeze(-1), v_codes * v_steps.unsqueeze(-1), length)
        cost = (coarse - attended(q, k, v, length)).square().mean()
        assert float((out - coarse).square().mean()) < float(cost) / 1e3


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
    """In float64."""
    group = q.shape[1] // k.shape[2]
    k, v = (x.flatten(0, 1)[:length].double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k) * q.shape[2] ** -0.5
    seen = torch.arange(length) <= torch.arange(length - len(q), length).unsqueeze(1)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).float()


@pytest.mark.parametrize("num_new", [1, 20])
def test_sums_as_large_as_they_get(device: CpuDevice, num_new: int) -> None:
    """512 times the largest code in 300 positions: sums are 2**31 less 1 %. Dies if a query or a weight takes one bit more."""
    k = torch.ones(38, 8, 1, 512)
    codes, steps = int8_entries(k)
    geometry = AttentionGeometry(
        num_heads=1, num_kv_heads=1, head_size=512, scale=1.0, block_size=8, dtype="float32", kv_dtype="int8"
    )
    kernel = PagedAttention(device, geometry)
    given = [torch.tensor(value, dtype=torch.int32) for value in ([num_new], [300], [0, num_new])]
    q, out = torch.ones(num_new, 1, 512), torch.zeros(num_new, 1, 512)
    plan = kernel.plan(BatchLayout(*given, torch.arange(38, dtype=torch.int32).view(1, -1)))
    kernel.run(q, KVSegments(own=(codes, codes, steps, steps)), plan, out)
    assert float((out - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("which", ["k", "v", "k and v", "q"])
@pytest.mark.parametrize("window", [None, 20])
def test_what_is_not_finite_is_seen_by_those_who_see_it(device: CpuDevice, which: str, window: int | None) -> None:
    """Position 5, or query 5 of 600, is NaN; others are as they were. Dies if it is left out in silence, spreads, or moves a bound of a loop."""
    torch.manual_seed(0)
    length, size = 600, 16
    k, v = (torch.randn(-(-length // size), size, 1, 64) for _ in range(2))
    q, tables = torch.randn(length, 1, 64), torch.arange(len(k), dtype=torch.int32).view(1, -1)
    geometry = AttentionGeometry(
        num_heads=1, num_kv_heads=1, head_size=64, scale=0.125, block_size=size, dtype="float32", kv_dtype="int8", sliding_window=window,
    )  # fmt: skip
    given = [torch.tensor(value, dtype=torch.int32) for value in ([length], [length], [0, length])]
    answers = []
    for is_broken in (False, True):
        for name, tensor in (("k", k), ("v", v)):
            if is_broken and name in which:
                tensor[0, 5] = float("nan")
        if is_broken and which == "q":
            q[5] = float("nan")
        (k_codes, k_steps), (v_codes, v_steps) = int8_entries(k), int8_entries(v)
        kernel, out = PagedAttention(device, geometry), torch.zeros_like(q)
        kernel.run(
            q, KVSegments(own=(k_codes, v_codes, k_steps, v_steps)), kernel.plan(BatchLayout(*given, tables)), out
        )
        answers.append(out)
    sees = torch.zeros(length, dtype=torch.bool)
    sees[5 : 6 if which == "q" else 5 + (window or length)] = True
    assert bool(answers[1][sees].isnan().all())
    assert torch.equal(answers[1][~sees], answers[0][~sees])
