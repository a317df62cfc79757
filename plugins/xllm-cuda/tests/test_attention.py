"""What the attention kernel promises beyond conformance: rows that do not feel their neighbours, splits in order, both kinds of tile."""

from __future__ import annotations

import torch
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


def test_what_it_cannot_do_is_refused_with_the_number() -> None:
    """Killed by: a check that was forgotten; the kernel would ask for more than a chip has."""
    from xllm_cuda.limits import check_attention

    assert check_attention(AttentionQuery(device_kind="cuda", geometry=geometry())) is None
    assert "512" in str(check_attention(AttentionQuery(device_kind="cuda", geometry=geometry(head_size=512))))
    many = geometry(num_heads=256, num_kv_heads=1)
    assert "256 heads" in str(check_attention(AttentionQuery(device_kind="cuda", geometry=many)))
