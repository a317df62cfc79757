"""Shapes, types and indices that do not fit are refused by name; nothing outside the tensors is read or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from xllm_cpu.attention import PagedAttention
from xllm_cpu.cache_ops import BlockCopy, KvWrite, KvWriteInt8, RopeKvWrite, RopeKvWriteInt8
from xllm_cpu.device import CpuDevice
from xllm_cpu.experts import LinearFloat32
from xllm_cpu.ops import AddRmsNorm, Embedding, Linear, LinearSiluMul, RmsNorm, Rope, SiluMul
from xllm_cpu.quantized import LinearBlocks, LinearInt8
from xllm_cpu.sampler import NativeSampler

from xllm_core.plugins import AttentionGeometry, BatchLayout, ConfigError, KVSegments, SamplingBatch

T = torch.randn
SLOTS = torch.tensor([0, 1])


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def linear(device: CpuDevice, x: torch.Tensor) -> Any:
    op = Linear(device)
    return op(x, op.prepare(T(4, 6), None))


def foreign(device: CpuDevice, op: Any) -> Any:
    return op(T(2, 6), Linear(device).prepare(T(4, 6), None))


def codes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


CODES = (codes(2, 4, 1, 8), codes(2, 4, 1, 8), T(2, 4, 1), T(2, 4, 1))

CALLS: dict[str, tuple[Callable[[CpuDevice], Any], type[Exception], str]] = {
    "linear, width": (lambda d: linear(d, T(2, 5)), ValueError, r"x must be \[T, 6\]"),
    "linear, dtype": (lambda d: linear(d, T(2, 6).bfloat16()), ValueError, "x must be"),
    "linear, half": (lambda d: Linear(d).prepare(T(4, 6).half(), None), TypeError, "neither float32 nor bfloat16"),
    "linear, elsewhere": (lambda d: linear(d, T(2, 6, device="meta")), ValueError, r"on the CPU: \(2, 6\) torch.float32 is on meta"),
    "linear, weight elsewhere": (lambda d: Linear(d).prepare(T(4, 6, device="meta"), None), ValueError, "is on meta"),
    "linear, weight": (lambda d: Linear(d).prepare(T(4, 6, 2), None), ValueError, r"must be \[out, in\]"),
    "linear_silu_mul, odd": (lambda d: LinearSiluMul(d).prepare(T(5, 6), None), ValueError, r"together \[2I, in\]"),
    "linear_float32, elsewhere": (
        lambda d: LinearFloat32(d)(T(2, 6, device="meta").bfloat16(), LinearFloat32(d).prepare(T(4, 6), None)), ValueError, "is on meta"
    ),
    "linear_int8, foreign": (lambda d: foreign(d, LinearInt8(d)), ValueError, "LinearInt8 was given what another op has packed"),
    "linear_blocks, foreign": (lambda d: foreign(d, LinearBlocks(d)), ValueError, "what another op has packed"),
    "embedding, high": (lambda d: Embedding(d)(ids(0, 3), T(3, 4)), IndexError, r"token id 3 at 1 is outside 0 .. 2"),
    "embedding, low": (lambda d: Embedding(d)(ids(-1), T(3, 4)), IndexError, "token id -1 at 0"),
    "embedding, type": (lambda d: Embedding(d)(torch.tensor([0], dtype=torch.int32), T(3, 4)), ValueError, "int64"),
    "rms_norm, weight": (lambda d: RmsNorm(d)(T(2, 8), T(7), 1e-5), ValueError, r"weight must be \[H\]"),
    "add_rms_norm, residual": (lambda d: AddRmsNorm(d)(T(2, 8), T(3, 8), T(8), 1e-5), ValueError, "residual"),
    "rms_norm, elsewhere": (lambda d: RmsNorm(d)(T(2, 8, device="meta"), T(8), 1e-5), ValueError, "is on meta"),
    "silu_mul, odd": (lambda d: SiluMul(d)(T(2, 7)), ValueError, "2I"),
    "rope, tokens": (lambda d: Rope(d)(T(2, 1, 8), T(2, 1, 8), T(1, 8), T(1, 8)), ValueError, "cos and sin"),
    "rope, too wide": (lambda d: Rope(d)(T(2, 1, 8), T(2, 1, 8), T(2, 10), T(2, 10)), ValueError, "at most D"),
    "kv_write, slot": (lambda d: KvWrite(d)((T(2, 1, 8),), (T(2, 4, 1, 8),), ids(0, 8)), IndexError, "slot 8 at 1 is outside 0 .. 7"),
    "kv_write, below": (lambda d: KvWrite(d)((T(2, 1, 8),), (T(2, 4, 1, 8),), ids(0, -2)), IndexError, "slot -2"),
    "kv_write, shape": (lambda d: KvWrite(d)((T(2, 2, 8),), (T(2, 4, 1, 8),), SLOTS), ValueError, "a cache must be"),
    "kv_write, strided": (lambda d: KvWrite(d)((T(2, 1, 8),), (T(4, 2, 1, 8).transpose(0, 1),), SLOTS), ValueError, "contiguous"),
    "rope_kv_write, slot": (
        lambda d: RopeKvWrite(d)(T(2, 2, 8), T(2, 1, 8), T(2, 1, 8), T(2, 8), T(2, 8), (T(2, 4, 1, 8), T(2, 4, 1, 8)), ids(99, 0)),
        IndexError, "slot 99 at 0",
    ),
    "kv_write_int8, slot": (lambda d: KvWriteInt8(d)((T(2, 1, 8),), CODES[::2], ids(0, 8)), IndexError, "slot 8 at 1 is outside 0 .. 7"),
    "kv_write_int8, steps": (lambda d: KvWriteInt8(d)((T(2, 1, 8),), (CODES[0], T(2, 4, 2)), SLOTS), ValueError, "steps float32"),
    "kv_write_int8, codes": (lambda d: KvWriteInt8(d)((T(2, 1, 8),), (T(2, 4, 1, 8), CODES[2]), SLOTS), ValueError, "must be int8"),
    "kv_write_int8, too few": (lambda d: KvWriteInt8(d)((T(2, 1, 8), T(2, 1, 8)), CODES[:3], SLOTS), ValueError, "shorter"),
    "rope_kv_write_int8, slot": (
        lambda d: RopeKvWriteInt8(d)(T(2, 2, 8), T(2, 1, 8), T(2, 1, 8), T(2, 8), T(2, 8), CODES, ids(99, 0)), IndexError, "slot 99 at 0",
    ),
    "rope_kv_write_int8, steps": (
        lambda d: RopeKvWriteInt8(d)(T(2, 2, 8), T(2, 1, 8), T(2, 1, 8), T(2, 8), T(2, 8), (*CODES[:3], T(2, 3, 1)), SLOTS),
        ValueError, "steps float32",
    ),
    "block_copy, source": (lambda d: BlockCopy(d)((T(3, 4, 1),), ids(3), ids(0)), IndexError, "block 3 to 0"),
    "block_copy, target": (lambda d: BlockCopy(d)((T(3, 4, 1),), ids(0), ids(-1)), IndexError, "block 0 to -1"),
    "block_copy, counts": (lambda d: BlockCopy(d)((T(3, 4, 1),), ids(0), ids(1, 2)), ValueError, "as many sources"),
    "index": (lambda d: CpuDevice(1), ConfigError, "only index 0"),
    "memory": (lambda d: d.allocate((1 << 50,), torch.float32), MemoryError, "cannot allocate"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_refused(device: CpuDevice, name: str) -> None:
    """Each with its reason."""
    call, error, text = CALLS[name]
    with pytest.raises(error, match=text):
        call(device)


def test_a_norm_of_a_strided_weight(device: CpuDevice, dtype: torch.dtype) -> None:
    """Every other number of a longer one, made contiguous for the call. Dies if that copy is gone before the kernel reads it."""
    x, residual, weight = (T(*shape).to(dtype) for shape in ((3, 4096), (3, 4096), (8192,)))
    strided = weight[::2]
    for _ in range(20):
        assert torch.equal(RmsNorm(device)(x, strided, 1e-5), RmsNorm(device)(x, strided.clone(), 1e-5))
        found, expected = (AddRmsNorm(device)(x, residual, w, 1e-5) for w in (strided, strided.clone()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_a_temperature_that_is_none(device: CpuDevice, temperature: float) -> None:
    """By row; the rows before it may be chosen already, nothing is written outside."""
    one = torch.ones(2, dtype=torch.int64)
    columns = {"temperature": torch.tensor([0.5, temperature]), "top_k": one * 3, "top_p": None, "min_p": None}
    batch = SamplingBatch(**columns, seeds=one, indices=one, positions=one, is_all_greedy=False)
    with pytest.raises(ValueError, match="of row 1 must be 0 or more"):
        NativeSampler(device).sample(T(2, 100), batch)


def layout(query: int, kv: int, *blocks: int) -> BatchLayout:
    return BatchLayout(
        *(torch.tensor(v, dtype=torch.int32) for v in ([query], [kv], [0, query])),
        torch.tensor([blocks], dtype=torch.int32),
    )


def test_attention_refuses_what_does_not_fit(device: CpuDevice) -> None:
    """Lengths beyond the table, more queries than tokens, blocks that are not there, wrong q and caches."""
    geometry = AttentionGeometry(num_heads=2, num_kv_heads=1, head_size=8, scale=1.0, block_size=4, dtype="float32")
    kernel = PagedAttention(device, geometry)
    for batch in (layout(1, 9, 0, 1), layout(5, 4, 0, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            kernel.plan(batch)
    plan = kernel.plan(layout(1, 8, 0, 5))
    cache = KVSegments(own=(T(3, 4, 1, 8), T(3, 4, 1, 8)))
    with pytest.raises(IndexError, match="a table names block 5, the cache has 3"):
        kernel.run(T(1, 2, 8), cache, plan, T(1, 2, 8))
    plan = kernel.plan(layout(1, 8, 0, 2))
    for q, own in (
        (T(2, 2, 8), cache.own),
        (T(1, 2, 8), (T(3, 4, 2, 8), T(3, 4, 2, 8))),
        (T(1, 2, 8).double(), cache.own),
    ):
        with pytest.raises(ValueError, match="must be"):
            kernel.run(q, KVSegments(own=own), plan, T(*q.shape).to(q.dtype))


def test_a_hole_is_outside_the_window_or_refused(device: CpuDevice) -> None:
    """-1 stands for a block that left the window. Red where a query that sees it is answered as if those positions were not there."""
    whole, windowed = (
        PagedAttention(
            device, AttentionGeometry(2, 1, 8, scale=1.0, block_size=4, dtype="float32", sliding_window=window)
        )
        for window in (None, 5)
    )
    for hole in (-1, -3, -100_000_000):
        for kernel, batch in (
            (whole, layout(1, 8, hole, 0)),
            (whole, layout(2, 8, 0, hole)),
            (windowed, layout(1, 8, hole, 0)),  # positions 3 to 7
            (windowed, layout(2, 9, hole, 0, 1)),  # of the first query also 3
            (windowed, layout(1, 9, 0, 1, hole)),
        ):
            with pytest.raises(IndexError, match="-1 or less where a query sees it"):
                kernel.plan(batch)
        assert windowed.plan(layout(1, 9, hole, 0, 1)).step.highest_block == 1  # positions 4 to 8
        assert whole.plan(layout(1, 8, 0, 1, hole)).step.highest_block == 1  # beyond the row's end


def test_a_replay_reads_no_block_that_is_not_there(device: CpuDevice) -> None:
    """The cache is that which the call was recorded with. Dies, with the process, where only the first step's tables are checked."""
    kernel = PagedAttention(device, AttentionGeometry(2, 1, 8, scale=1.0, block_size=4, dtype="float32"))
    plan = kernel.graph_plan(2, 4)
    kernel.refill(plan, layout(1, 8, 0, 2))
    q, cache, out = T(2, 2, 8), KVSegments(own=(T(3, 4, 1, 8), T(3, 4, 1, 8))), torch.empty(2, 2, 8)

    def step() -> torch.Tensor:
        kernel.run(q, cache, plan, out)
        return out

    graph, _ = device.capture(step, 2)
    expected = out[:1].clone()
    kernel.refill(plan, layout(1, 8, 0, 50_000_000))
    with pytest.raises(IndexError, match="attention, call 1 of 1: an index is outside"):
        graph.replay(1)
    kernel.refill(plan, layout(1, 8, 0, 2))
    out.zero_()
    graph.replay(1)
    assert torch.equal(out[:1], expected)


def test_geometries_and_layouts_that_make_no_sense(device: CpuDevice) -> None:
    """Heads that cannot be shared out, and numbers that 32 bits would cut."""
    for heads, kv_heads in ((1, 2), (5, 2), (2, 0)):
        with pytest.raises(ConfigError, match="are not shared out equally"):
            PagedAttention(device, AttentionGeometry(heads, kv_heads, 8, scale=1.0, block_size=4, dtype="float32"))
    kernel = PagedAttention(device, AttentionGeometry(2, 1, 8, scale=1.0, block_size=4, dtype="float32"))
    batch = layout(1, 8, 0, 1)
    batch.block_tables = batch.block_tables.to(torch.int64) + 2**32
    with pytest.raises(ValueError, match="must be int32"):
        kernel.plan(batch)


def test_attention_refuses_codes_that_do_not_fit(device: CpuDevice) -> None:
    """Codes where the model's numbers are meant and the other way round, steps that are missing or of another shape, heads of too many numbers."""
    common = {"num_heads": 2, "num_kv_heads": 1, "scale": 1.0, "block_size": 4, "dtype": "float32"}
    plain, small = (
        PagedAttention(device, AttentionGeometry(head_size=8, kv_dtype=kv, **common)) for kv in (None, "int8")
    )
    for kernel, own, text in (
        (plain, CODES, "must be"), (small, (T(2, 4, 1, 8), T(2, 4, 1, 8), *CODES[2:]), "must be"), (small, CODES[:2], "0 tensors of steps"),
        (small, CODES[:3], "1 tensors of steps"), (small, (*CODES[:3], T(2, 4, 2)), "2 tensors of steps"),
        (small, (*CODES[:3], CODES[3].double()), "2 tensors of steps"), (plain, (T(2, 4, 1, 8), T(2, 4, 1, 8), *CODES[2:]), "of others none"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            kernel.run(T(1, 2, 8), KVSegments(own=own), kernel.plan(layout(1, 8, 0, 1)), T(1, 2, 8))
    with pytest.raises(ConfigError, match="heads of up to 512 so, this model has 513"):
        PagedAttention(device, AttentionGeometry(head_size=513, kv_dtype="int8", **common))


def test_nothing_to_do(device: CpuDevice) -> None:
    """No rows at all are no reason to fail."""
    op = Linear(device)
    assert op(T(0, 6), op.prepare(T(4, 6), None)).shape == (0, 4)
    assert RmsNorm(device)(T(0, 8), T(8), 1e-5).shape == (0, 8)
    KvWrite(device)((T(0, 1, 8),), (T(2, 4, 1, 8),), ids())
    BlockCopy(device)((T(2, 4, 1),), ids(), ids())
