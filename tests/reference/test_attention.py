"""Paged attention against a dense one in float64, row by row. Slots nobody may read hold NaN, so that reading one shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_core.plugins.contracts.attention import AttentionGeometry, BatchLayout, KVSegments
from xllm_core.reference import attention
from xllm_core.reference.attention import ReferenceAttention
from xllm_core.reference.device import ReferenceDevice

HEAD_SIZE = 8


class Case:
    """A ragged batch over a scrambled paged cache, and what dense attention says about it."""

    def __init__(self, rows: Sequence[tuple[int, int]], geometry: AttentionGeometry) -> None:
        self.rows, self.geometry = rows, geometry
        generator = torch.Generator().manual_seed(len(rows))
        size, dtype = geometry.block_size, getattr(torch, geometry.dtype)
        blocks = [-(-kv_len // size) for _, kv_len in rows]
        order = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
        shape = (len(order), size, geometry.num_kv_heads, geometry.head_size)
        self.caches = tuple(torch.full(shape, float("nan"), dtype=dtype) for _ in "kv")
        self.tables = torch.full((len(rows), max(blocks) + 1), -1, dtype=torch.int32)
        self.dense: list[tuple[torch.Tensor, ...]] = []
        for row, (num_queries, kv_len) in enumerate(rows):
            own = [order.pop() for _ in range(blocks[row])]
            first_seen = (
                0 if geometry.sliding_window is None else max(0, kv_len - num_queries - geometry.sliding_window + 1)
            )
            dense = tuple(torch.randn(kv_len, *shape[2:], generator=generator).to(dtype) for _ in "kv")
            for position in range(first_seen, kv_len):
                for cache, tensor in zip(self.caches, dense, strict=True):
                    cache[own[position // size], position % size] = tensor[position]
            for index in range(first_seen // size, blocks[row]):  # blocks that left the window are holes
                self.tables[row, index] = own[index]
            self.dense.append(dense)
        total = sum(num_queries for num_queries, _ in rows)
        self.q = torch.randn(total, geometry.num_heads, geometry.head_size, generator=generator).to(dtype)

    def run(self) -> torch.Tensor:
        query_lens = torch.tensor([row[0] for row in self.rows], dtype=torch.int32)
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), query_lens.cumsum(0).to(torch.int32)))
        kv_lens = torch.tensor([row[1] for row in self.rows], dtype=torch.int32)
        kernel = ReferenceAttention(ReferenceDevice(0), self.geometry)
        plan = kernel.plan(BatchLayout(query_lens, kv_lens, starts, self.tables))
        self.num_calls = len(plan)
        out = torch.full_like(self.q, float("nan"))
        kernel.run(self.q, KVSegments(own=self.caches), plan, out)
        return out

    def expected(self) -> torch.Tensor:
        geometry, rows, start = self.geometry, [], 0
        for (num_queries, kv_len), (keys, values) in zip(self.rows, self.dense, strict=True):
            for index in range(num_queries):
                position = kv_len - num_queries + index
                first = 0 if geometry.sliding_window is None else max(0, position - geometry.sliding_window + 1)
                heads = []
                for head in range(geometry.num_heads):
                    group = head * geometry.num_kv_heads // geometry.num_heads
                    seen = keys[first : position + 1, group].double(), values[first : position + 1, group].double()
                    scores = seen[0] @ self.q[start + index, head].double() * geometry.scale
                    if geometry.soft_cap is not None:
                        scores = geometry.soft_cap * torch.tanh(scores / geometry.soft_cap)
                    heads.append(scores.softmax(0) @ seen[1])
                rows.append(torch.stack(heads))
            start += num_queries
        return torch.stack(rows)


def make_geometry(**changes: object) -> AttentionGeometry:
    facts = {
        "num_heads": 6, "num_kv_heads": 2, "head_size": HEAD_SIZE, "scale": 1 / math.sqrt(HEAD_SIZE), "block_size": 4, "dtype": "float32",
    }  # fmt: skip
    return AttentionGeometry(**{**facts, **changes})  # type: ignore[arg-type]


RAGGED = [(1, 1), (1, 4), (1, 5), (7, 7), (3, 9), (1, 40), (8, 8), (1, 33), (5, 21), (1, 8)]


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 6}, {"soft_cap": 2.0}, {"sliding_window": 1}, {"soft_cap": 2.0, "sliding_window": 7}],
)
def test_ragged_batch(heads: tuple[int, int], changes: dict[str, object]) -> None:
    """Decode, whole prefill and chunks together, at block edges. Killed by: a wrong mask offset, head order or slot, padding that is seen."""
    case = Case(RAGGED, make_geometry(num_heads=heads[0], num_kv_heads=heads[1], **changes))
    assert torch.allclose(case.run().double(), case.expected(), atol=1e-5)


def test_bfloat16() -> None:
    """Sums in float32, rounds once. Killed by: a softmax in bfloat16."""
    case = Case(RAGGED, make_geometry(dtype="bfloat16"))
    assert torch.allclose(case.run().double(), case.expected(), atol=2e-2)


def test_many_rows_are_split_into_bounded_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 rows of up to 32 tokens, 64 at a time. Killed by: losing rows at the edge of a part, one row at a time, all at once."""
    monkeypatch.setattr(attention, "_MAX_GATHERED", 64)
    case = Case([(1, 20 + index) for index in range(12)], make_geometry())
    assert torch.allclose(case.run().double(), case.expected(), atol=1e-5)
    assert case.num_calls == 6


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_ragged_batch(data: st.DataObject) -> None:
    """Whatever the lengths, block size and window. Killed by the same mutations, at edges nobody thought of."""
    kv_lens = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    rows = [(data.draw(st.integers(1, kv_len)), kv_len) for kv_len in kv_lens]
    window = data.draw(st.none() | st.integers(1, 45))
    case = Case(rows, make_geometry(block_size=data.draw(st.sampled_from([1, 3, 16])), sliding_window=window))
    assert torch.allclose(case.run().double(), case.expected(), atol=1e-5)


def test_a_row_does_not_feel_its_neighbours() -> None:
    """Alone or padded among longer rows, a row differs by no more than rounding. Killed by: padding that takes part in the softmax."""
    together = Case([(1, 17), (1, 31), (1, 18)], make_geometry())
    outputs = together.run()
    for row in range(3):
        alone = Case([together.rows[row]], make_geometry())
        alone.caches, alone.tables, alone.q = together.caches, together.tables[row : row + 1], together.q[row : row + 1]
        assert torch.allclose(alone.run()[0], outputs[row], atol=1e-6)
