"""Log probabilities of the model itself: before processors, temperature and filters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xllm_core.types import TokenLogprobs

_CHUNK_ROWS = 128


def score_rows(logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs | None]:
    """One entry per row. logits: [S, V] float32. counts[i]: likeliest tokens to list; -1 reports nothing for that row."""
    rows = [i for i, count in enumerate(counts) if count >= 0]
    found: list[TokenLogprobs | None] = [None] * len(counts)
    if not rows:
        return found
    scores = logits[torch.tensor(rows, device=logits.device)].log_softmax(dim=-1)
    chosen = torch.tensor([token_ids[i] for i in rows], device=logits.device).unsqueeze(-1)
    own = scores.gather(-1, chosen)
    ranks: list[int] = ((scores > own).sum(dim=-1) + 1).tolist()
    most = max(counts[i] for i in rows)
    values, ids = scores.topk(most, dim=-1) if most else (scores[:, :0], scores[:, :0].long())
    for row, own_value, rank, top_values, top_ids in zip(
        rows, own.squeeze(-1).tolist(), ranks, values.tolist(), ids.tolist(), strict=True
    ):
        top = tuple(zip(top_ids[: counts[row]], top_values[: counts[row]], strict=True))
        found[row] = TokenLogprobs(token_ids[row], own_value, rank, top)
    return found


def score_targets(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: Sequence[int], count: int
) -> list[TokenLogprobs]:
    """Score the known next token of each position, a few rows of logits at a time. hidden: [N, H]; a last target of -1 is left out."""
    scores: list[TokenLogprobs] = []
    num = len(targets) - (targets[-1] < 0 if targets else 0)
    for first in range(0, num, _CHUNK_ROWS):
        end = min(num, first + _CHUNK_ROWS)
        part = score_rows(head(hidden[first:end]), targets[first:end], [count] * (end - first))
        scores += [s for s in part if s is not None]
    return scores
