"""The sampler on rows that are cut into chunks: the reference's tokens, whatever a threshold meets and wherever the chunks end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from xllm_cuda import sampler
from xllm_cuda.tiling import SamplerTiling
from xllm_cuda_shim.device import ShimDevice

from xllm_core.plugins import SamplingBatch
from xllm_core.runtime.sampler import GumbelSampler

CHUNK, ROOM = 64, 32
NEVER = float("-inf")


@pytest.fixture(autouse=True)
def tiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks so short that small vocabularies have several, and room for a few open tokens."""
    small = SamplerTiling(chunk=CHUNK, block=32, wide_block=64, room=ROOM, num_warps=1, row_warps=1)
    monkeypatch.setattr(sampler, "sampler_tiling", lambda vocab_size: small)
    yield


def batch_of(rows: Sequence[tuple[float, int, float, float]], *, seed: int = 0) -> SamplingBatch:
    """rows: (temperature, top_k, top_p, min_p) of each."""
    heat, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randint(0, 1 << 40, (len(rows),), generator=generator) for _ in range(3)]
    return SamplingBatch(False, heat.float(), top_k.long(), top_p.float(), min_p.float(), *noise)


def sample(logits: torch.Tensor, batch: SamplingBatch) -> list[int]:
    """By the kernels, interpreted; the logits stay as they are."""
    before = logits.clone()
    with torch.inference_mode():
        tokens = sampler.TritonSampler(ShimDevice()).sample(logits, batch)
    assert torch.equal(logits, before) and tokens.dtype == torch.int64
    found: list[int] = tokens.tolist()
    return found


def reference(logits: torch.Tensor, batch: SamplingBatch) -> list[int]:
    """The core's tokens."""
    chosen: list[int] = GumbelSampler(ShimDevice()).sample(logits.clone(), batch).tolist()
    return chosen


def random_logits(num_rows: int, vocab: int, spread: float = 3.0, *, seed: int = 1) -> torch.Tensor:
    """[num_rows, vocab] float32."""
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


MIXED = [
    (0.0, 5, 0.5, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.1), (1.0, 7, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (1.0, 0, 0.2, 0.0),
    (0.8, 40, 0.8, 0.0), (1.5, 150, 0.95, 0.02), (1.0, 10**6, 1.0, 0.0), (0.05, 3, 0.99, 0.0), (1.0, 1, 0.5, 0.0), (2.0, 90, 1.0, 0.2),
]  # fmt: skip
"""Rows of every kind."""


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [1, 3, CHUNK, CHUNK + 1, 9 * CHUNK - 7])
def test_mixed_rows(vocab: int) -> None:
    """Vocabularies of one chunk and of several, that end with a chunk and not. Killed by: a chunk too few, a token read beyond the row, a row
    that takes the way of another kind.
    """
    batch, logits = batch_of(MIXED), random_logits(len(MIXED), vocab)
    logits[::2, -1] += 8.0
    assert sample(logits, batch) == reference(logits, batch)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.02, 1.0, 20.0])
def test_rows_as_flat_and_as_steep_as_they_come(spread: float) -> None:
    """Flat rows leave more open than there is room for, steep ones reach into the bin without an end. Killed by: the room's end not seen."""
    filters = [(1.0, 100, 1.0), (1.0, 0, 0.5), (1.0, 100, 0.7), (1.0, 190, 0.99), (0.2, 0, 0.999)]
    rows = [(*columns, 0.0) for columns in filters]
    batch, logits = batch_of(rows), random_logits(len(rows), 200, spread)
    assert sample(logits, batch) == reference(logits, batch)


@pytest.mark.slow
def test_thresholds_are_exact() -> None:
    """Under noise that favours the last token which the filters keep, and the first which they leave out. Killed by: bounds of bins that are too
    tight, weights of the surely kept left out, min-p not asked there.
    """
    num_seeds, logits = 10000, random_logits(1, 200, 1.0)
    scores, order = logits[0].sort(descending=True)
    rows: list[tuple[float, int, float, float]] = []
    noise: list[torch.Tensor] = []
    for top_k, top_p, min_p in [(0, 0.5, 0.0), (0, 0.9, 0.0), (100, 0.7, 0.0), (30, 1.0, 0.0), (150, 1.0, 0.2)]:
        weights = scores[: top_k or None].softmax(0)
        num_kept = int((weights.cumsum(0) - weights < top_p).sum()) if top_p < 1 else len(weights)
        num_kept = min(num_kept, int((scores.exp() >= min_p * scores[0].exp()).sum()))
        many = batch_of([(1.0, top_k, top_p, min_p)] * num_seeds)
        kept = reference(logits.expand(num_seeds, -1), many)
        free = reference(logits.expand(num_seeds, -1), replace(many, top_k=None, top_p=None, min_p=None))
        chosen = [kept.index(int(order[num_kept - 1])), free.index(int(order[num_kept]))]
        rows += [(1.0, top_k, top_p, min_p)] * 2
        noise.append(torch.stack([many.seeds, many.indices, many.positions])[:, chosen])
    seeds, indices, positions = torch.cat(noise, 1)
    batch = replace(batch_of(rows), seeds=seeds, indices=indices, positions=positions)
    logits = logits.expand(len(rows), -1).contiguous()
    assert sample(logits, batch) == reference(logits, batch)


@pytest.mark.slow
@pytest.mark.parametrize("copies", [4, 40])
def test_ties_at_the_threshold_are_kept(copies: int) -> None:
    """Of five scores that occur `copies` times each, the third is parted by no filter, whether its tokens fit into the room or not.
    Killed by: a threshold that counts some of equal scores only.
    """
    vocab, num_rows = 5 * copies, 10
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(3))
    logits = (torch.arange(vocab) // copies)[order].float().mul(-0.1).expand(num_rows, vocab).contiguous()
    top_k, top_p = int(2.5 * copies), float(logits[0].softmax(0)[logits[0] > -0.25].sum()) - 0.1
    noise = batch_of([(1.0, 0, 1.0, 0.0)] * num_rows, seed=4)
    allowed = torch.where(logits > -0.25, logits, NEVER)
    wanted = reference(allowed, replace(noise, top_k=None, top_p=None, min_p=None))
    assert {round(float(logits[0, token]), 1) for token in wanted} == {0.0, -0.1, -0.2}
    ones = torch.ones(num_rows)
    for batch in (replace(noise, top_k=(ones * top_k).long()), replace(noise, top_p=ones * top_p)):
        assert sample(logits, batch) == wanted


@pytest.mark.slow
def test_the_smallest_of_equal_tokens_wins() -> None:
    """Across chunks, for rows of temperature 0. Killed by: chunks merged without regard to ids, or from the last one on."""
    logits = torch.zeros(3, 4 * CHUNK)
    logits[0, [200, 70, 130]] = 1.0
    logits[1, [255, 63, 64]] = 1.0
    assert sample(logits, batch_of([(0.0, 0, 1.0, 0.0)] * 3)) == [70, 63, 0]


@pytest.mark.slow
def test_masked_tokens_are_never_chosen() -> None:
    """Rows of which little, one token or nothing is left, and fewer than top-k wants. Killed by: -inf less -inf."""
    vocab = 5 * CHUNK - 7
    rows = [row for row in MIXED[::2] for _ in range(2)]
    batch, logits = batch_of(rows), random_logits(len(rows), vocab)
    left = torch.zeros(vocab, dtype=torch.bool)
    left[[5, 77, 80, 81, 82, 299]] = True
    masked = torch.where(left, logits, NEVER)
    masked[1::2, :299] = NEVER
    masked[1::2, 300:] = NEVER
    found = sample(masked, batch)
    assert found == reference(masked, batch)
    assert found[1::2] == [299] * (len(rows) // 2)
    assert sample(torch.full_like(masked, NEVER), batch) == [0] * len(rows)
    masked[:, 81] = masked[:, 82] = float("inf")
    assert sample(masked, batch) == [81] * len(rows)


@pytest.mark.slow
def test_a_row_alone_and_among_others() -> None:
    """Also where the rows lie apart, and where no row has a filter of some kind. Killed by: scratch of one row in another's place, a stride that is
    left out.
    """
    logits, batch = random_logits(len(MIXED), 300), batch_of(MIXED)
    together = sample(logits, batch)
    apart = torch.full((len(MIXED), 311), 50.0)
    apart[:, :300] = logits
    assert sample(apart[:, :300], batch) == together
    for row in range(1, len(MIXED), 3):
        columns = {
            name: getattr(batch, name)[row : row + 1]
            for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "indices", "positions")
        }
        off = {"top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
        absent = {name: None for name, value in off.items() if float(columns[name][0]) == value}
        alone = SamplingBatch(False, **{**columns, **absent})
        assert sample(logits[row : row + 1], alone) == together[row : row + 1], MIXED[row]
