"""What the attention kernel promises beyond conformance: rows that do not feel their neighbours, splits in order, both kinds of tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from xllm_cuda import attention as launches
from xllm_cuda.attention import TritonAttention
from xllm_cuda.tiling import WIDE_SPLITS
from xllm_cuda_shim.device import ShimDevice

from xllm_core.plugins import AttentionGeometry, AttentionQuery, KVSegments
from xllm_core.testing.paged import PagedBatch, attend, expected, make_batch

DEVICE = ShimDevice()


def geometry(**changes: object) -> AttentionGeometry:
    """Six heads over two, of sixteen elements, in blocks of five."""
    fields = {"num_heads": 6, "num_kv_heads": 2, "head_size": 16, "scale": 0.25, "block_size": 5, "dtype": "float32"}
    return AttentionGeometry(**(fields | changes))  # type: ignore[arg-type]


def kernel(of: AttentionGeometry, kv_split_tokens: int = 16) -> TritonAttention:
    """With splits that short rows already fill."""
    return TritonAttention(DEVICE, of, kv_split_tokens=kv_split_tokens)


def worst(answer: torch.Tensor, batch: PagedBatch) -> float:
    """Largest difference from the reference."""
    return float((answer - expected(batch)).abs().max())


def test_a_row_is_the_same_in_every_company() -> None:
    """Equal to the bit alone, among others, and in another order: narrow and wide tiles, one split and several. Killed by: tiles or splits
    that follow from the batch; a merge in the order of arrival.
    """
    rows = [(1, 9), (1, 33), (12, 40), (2, 2), (7, 7), (1, 70), (1, 1)]
    batch = make_batch(geometry(), rows)
    attention = kernel(batch.geometry)
    starts = [*batch.layout().query_starts.tolist()]
    together = attend(attention, DEVICE, batch)
    for row in range(len(rows)):
        assert torch.equal(attend(attention, DEVICE, batch.pick([row])), together[starts[row] : starts[row + 1]]), rows[
            row
        ]
    backwards = list(reversed(range(len(rows))))
    pieces = [together[starts[row] : starts[row + 1]] for row in backwards]
    assert torch.equal(attend(attention, DEVICE, batch.pick(backwards)), torch.cat(pieces))


def test_splits_change_nothing_but_roundings() -> None:
    """One split, several in narrow tiles, several in wide ones. Killed by: a merge without weights, a split left out or counted twice."""
    batch = make_batch(geometry(), [(1, 5 * 16), (1, 16), (1, 17), (11, 19 * WIDE_SPLITS)])
    whole, split = kernel(batch.geometry, 4096), kernel(batch.geometry, 16)
    # Five queries to a narrow tile and ten to a wide one: 16 and 32 score rows, of three heads each.
    merges = [launch.merges for launch in split.plan(batch.layout()).launches]
    assert [None if m is None else m[:, 3].tolist() for m in merges] == [[5, 2], [2, 2]]
    assert all(launch.merges is None for launch in whole.plan(batch.layout()).launches)
    assert worst(attend(whole, DEVICE, batch), batch) < 1e-5
    assert worst(attend(split, DEVICE, batch), batch) < 1e-5


def test_a_split_without_visible_keys_has_no_weight() -> None:
    """Two queries on both sides of the edge of a split: the first sees nothing of the second split. Killed by: 0/0, or exp of -inf less -inf."""
    batch = make_batch(geometry(), [(2, 17)])
    assert worst(attend(kernel(batch.geometry), DEVICE, batch), batch) < 1e-5


def test_a_window_skips_splits() -> None:
    """Keys before the window are neither read nor planned: their blocks are holes. Killed by: splits counted from the first key."""
    batch = make_batch(geometry(sliding_window=8), [(1, 90), (3, 64)])
    (launch,) = kernel(batch.geometry).plan(batch.layout()).launches
    assert launch.tiles[:, 4].tolist() == [5, 3] and launch.tiles[:, 5].tolist() == [
        82,
        54,
    ]  # split and first visible key of each tile
    assert worst(attend(kernel(batch.geometry), DEVICE, batch), batch) < 1e-5


def test_queries_may_lie_in_a_larger_tensor() -> None:
    """q as a view of queries, keys and values of one product. Killed by: a kernel that takes strides for granted."""
    batch = make_batch(geometry(), [(1, 9), (4, 12)])
    attention = kernel(batch.geometry)
    wide = torch.full((len(batch.q), 10, 16), 7.0)
    wide[:, 2:8] = batch.q
    out = torch.full_like(batch.q, float("nan"))
    attention.run(wide[:, 2:8], KVSegments(own=(batch.k, batch.v)), attention.plan(batch.layout()), out)
    assert worst(out, batch) < 1e-5


@pytest.mark.parametrize("window", [None, 1, 17, 18])
@pytest.mark.parametrize("programs", [2, 2048])
def test_a_plan_in_place_is_any_step(programs: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer rows, shorter, fewer and more: to the bit what a new plan gives, with fewer programs than tiles and with as many. Killed by: a
    program that does one tile only, tiles or merges left from the step before, partial results that stay where the first step had them.
    """
    monkeypatch.setattr(launches, "GRAPH_PROGRAMS", programs)
    of = geometry() if window is None else geometry(sliding_window=window)
    attention = kernel(of)
    plan, other = attention.graph_plan(5, 20), attention.graph_plan(2, 20)
    for step, lengths in enumerate([[3, 40, 2], [9], [100, 17, 1, 33, 64], [16, 100], [70, 70, 70, 70]]):
        batch = make_batch(of, [(1, length) for length in lengths], seed=step)
        want = attend(attention, DEVICE, batch)
        attention.refill(plan, batch.layout())
        assert torch.equal(attend(attention, DEVICE, batch, plan=plan, room=5), want), lengths
        assert worst(want, batch) < 1e-5
        if len(lengths) <= 2:  # another graph of the same kernel: they share the partial results
            attention.refill(other, batch.layout())
            assert torch.equal(attend(attention, DEVICE, batch, plan=other, room=2), want), lengths


def test_short_rows_are_laid_out_as_others_are() -> None:
    """Steps of one token a row have a way of their own, until a row needs a second split. Killed by: a column that is another there."""
    attention, short = kernel(geometry(), 64), [3, 64, 1, 17]
    tiles = [make_batch(geometry(), [(1, length) for length in lengths]).layout() for lengths in (short, [*short, 65])]
    quick, general = (attention.plan(layout).launches[0].tiles for layout in tiles)
    assert len(general) == len(short) + 2 and torch.equal(quick, general[: len(short)])


def test_block_tables_are_copied_when_they_change() -> None:
    """Also where the caller writes the next step into the same array. Killed by: a table that is taken for the one before."""
    attention, batch = kernel(geometry()), make_batch(geometry(), [(1, 40), (1, 22)])
    plan, tables = attention.graph_plan(2, 20), batch.layout().block_tables
    for step in range(3):
        layout = replace(batch.layout(), block_tables=tables)
        attention.refill(plan, layout)
        assert torch.equal(plan.tables[:2, : tables.shape[1]].cpu(), tables)
        before = plan.seen
        attention.refill(plan, layout)
        assert plan.seen is before
        tables[step % 2, step] += 1
    attention.refill(plan, make_batch(geometry(), [(1, 7)]).layout())
    attention.refill(plan, replace(batch.layout(), block_tables=tables))
    assert torch.equal(plan.tables[:2, : tables.shape[1]].cpu(), tables)


def test_a_plan_in_place_stays_and_has_room_for_the_longest_rows() -> None:
    """Addresses are what a graph has recorded. Killed by: a refill that makes tensors, room for fewer tiles than a full table needs."""
    attention = kernel(geometry())
    plan = attention.graph_plan(2, 20)
    names = ("ints", "header", "tiles", "merges", "tables")
    before = [getattr(plan, name).data_ptr() for name in names]
    batch = make_batch(geometry(), [(1, 100), (1, 97)])
    attention.refill(plan, batch.layout())
    assert [getattr(plan, name).data_ptr() for name in names] == before
    assert {plan.ints.untyped_storage().data_ptr()} == {
        getattr(plan, name).untyped_storage().data_ptr() for name in names[1:4]
    }
    assert plan.header[0] == len(plan.tiles) == 14 and plan.merges[:, 3].tolist() == [7, 7]
    with_window = kernel(geometry(sliding_window=18)).graph_plan(1, 20)
    assert len(with_window.tiles) == 3  # the last key of a split, the next sixteen, and the first of another
    attention.refill(plan, make_batch(geometry(), [(1, 3)]).layout())
    assert plan.header[0] == 2 and plan.merges[:, 1].tolist() == [0, 0]


def test_padding_answers_zero() -> None:
    """Nobody reads it, but layers behind compute with it. Killed by: rows that keep what their memory held, which may be no number."""
    batch = make_batch(geometry(), [(1, 40)])
    attention = kernel(geometry())
    plan = attention.graph_plan(3, 20)
    attention.refill(plan, batch.layout())
    out = torch.full((3, 6, 16), float("nan"))
    q = torch.cat([batch.q, torch.full((2, 6, 16), float("nan"))])
    attention.run(q, KVSegments(own=(batch.k, batch.v)), plan, out)
    assert worst(out[:1], batch) < 1e-5 and out[1:].eq(0).all()


@pytest.mark.parametrize("rows", [[(1, 4), (1, 4), (1, 4)], [(2, 4)], [(1, 101)]])
def test_a_step_that_does_not_fit_is_refused(rows: list[tuple[int, int]]) -> None:
    """Too many rows, more than one token, more blocks. Killed by: a copy that would write behind the plan's tensors, or not at all."""
    attention = kernel(geometry())
    with pytest.raises(ValueError, match="do not fit a graph of 2 rows of one new token and 20 blocks of 5"):
        attention.refill(attention.graph_plan(2, 20), make_batch(geometry(), rows).layout())


def test_what_it_cannot_do_is_refused_with_the_number() -> None:
    """Killed by: a check that was forgotten; the kernel would ask for more than a chip has."""
    from xllm_cuda.limits import check_attention

    assert check_attention(AttentionQuery(device_kind="cuda", geometry=geometry())) is None
    assert "512" in str(check_attention(AttentionQuery(device_kind="cuda", geometry=geometry(head_size=512))))
    many = geometry(num_heads=256, num_kv_heads=1)
    assert "256 heads" in str(check_attention(AttentionQuery(device_kind="cuda", geometry=many)))
