"""Token choice on torch tensors: argmax, or argmax of filtered, tempered and noised scores. The reference for other samplers."""

from __future__ import annotations

import torch

from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.sampling import SamplingBatch
from xllm_core.runtime.noise import gumbel, stream_keys

# Rows with top_k up to `limit` are cut to a list of `size` candidates; the spare places hold ties with the k-th. Rows with more take the long way.
_SHORT_LISTS = ((0, 64, 128), (64, 1024, 1088))
NEVER = float("-inf")


class GumbelSampler:
    """Order: temperature, top-k, top-p (within what top-k left), min-p (relative to the likeliest), noise, argmax.

    Ties at a threshold are kept, so a filter never depends on the order in which equal scores were sorted. Row i depends on row i alone:
    which of the two paths a row takes (a short candidate list, or the whole vocabulary) is decided by its own parameters and scores.
    """

    def __init__(self, device: DeviceBackend) -> None:
        self._device = device

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """logits: [S, V] float32, overwritten. Returns [S] int64."""
        if batch.is_all_greedy or batch.temperature is None:
            return logits.argmax(dim=-1)
        keys = stream_keys(batch.seeds.tolist(), batch.indices.tolist(), batch.positions.tolist()).to(logits.device)
        is_greedy = batch.temperature == 0
        chosen = logits.argmax(dim=-1)
        vocab = logits.shape[-1]
        is_open = ~is_greedy
        if batch.top_k is not None:
            for above, limit, size in _SHORT_LISTS:
                if size < vocab:
                    rows = (~is_greedy & (batch.top_k > above) & (batch.top_k <= limit)).nonzero().squeeze(-1)
                    if len(rows):
                        chosen[rows], is_open[rows] = _choose_short(logits[rows], batch, rows, keys[rows], size)
        rows = is_open.nonzero().squeeze(-1)
        if len(rows):
            chosen[rows] = _choose_full(logits[rows], batch, rows, keys[rows])
        return chosen


def _column(column: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return column[rows].unsqueeze(-1)


def _tempered(logits: torch.Tensor, temperature: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Counted from the likeliest, so that the coldest temperature cannot overflow."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / _column(temperature, rows)


def _choose_short(
    logits: torch.Tensor, batch: SamplingBatch, rows: torch.Tensor, keys: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a small top-k: everything happens on the `size` likeliest candidates. Also tells which rows have ties beyond those."""
    assert batch.temperature is not None and batch.top_k is not None
    top_k = _column(batch.top_k, rows)
    scores, token_ids = _tempered(logits, batch.temperature, rows).topk(size, dim=-1)
    least = scores.gather(-1, top_k - 1)
    is_short = (scores[:, -1:] == least) & (least > NEVER)
    scores = scores.masked_fill(scores < least, NEVER)
    scores = _filter_sorted(scores, batch, rows)
    noised = scores + gumbel(keys.unsqueeze(-1), token_ids)
    return token_ids.gather(-1, noised.argmax(dim=-1, keepdim=True)).squeeze(-1), is_short.squeeze(-1)


def _choose_full(logits: torch.Tensor, batch: SamplingBatch, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Rows that may choose from the whole vocabulary, or from a large part of it."""
    assert batch.temperature is not None
    scores = _tempered(logits, batch.temperature, rows)
    has_top_k = batch.top_k is not None and bool((batch.top_k[rows] > 0).any())
    has_top_p = batch.top_p is not None and bool((batch.top_p[rows] < 1).any())
    if has_top_k or has_top_p:
        ordered = scores.sort(dim=-1, descending=True).values
        if has_top_k:
            assert batch.top_k is not None
            vocab = logits.shape[-1]
            last = _column(batch.top_k, rows)
            last = torch.where(last > 0, last.clamp(max=vocab), vocab) - 1
            ordered = ordered.masked_fill(ordered < ordered.gather(-1, last), NEVER)
        ordered = _filter_sorted(ordered, batch, rows)
        lowest = ordered.masked_fill(ordered == NEVER, float("inf")).amin(dim=-1, keepdim=True)
        scores = scores.masked_fill(scores < lowest, NEVER)
    elif batch.min_p is not None:
        floor = scores.amax(dim=-1, keepdim=True) + _column(batch.min_p, rows).log()
        scores = scores.masked_fill(scores < floor, NEVER)
    noise = gumbel(keys.unsqueeze(-1), torch.arange(logits.shape[-1], device=logits.device))
    return (scores + noise).argmax(dim=-1)


def _filter_sorted(scores: torch.Tensor, batch: SamplingBatch, rows: torch.Tensor) -> torch.Tensor:
    """Top-p and min-p on scores sorted from high to low; what falls out becomes -inf. At least the first stays."""
    if batch.top_p is not None:
        probabilities = scores.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        is_out = before >= _column(batch.top_p, rows)
        is_out &= _column(batch.top_p, rows) < 1
        is_out[:, 0] = False
        lowest = scores.masked_fill(is_out | (scores == NEVER), float("inf")).amin(dim=-1, keepdim=True)
        scores = scores.masked_fill(scores < lowest, NEVER)
    if batch.min_p is not None:
        scores = scores.masked_fill(scores < scores[:, :1] + _column(batch.min_p, rows).log(), NEVER)
    return scores
