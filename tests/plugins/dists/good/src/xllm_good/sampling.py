"""A sampler and a logits processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xllm_core.plugins import ProcessorContext, SamplingBatch
from xllm_core.types import SlotState

BANNED = 7


class GreedySampler:
    """The likeliest token, whatever was asked."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """[S, V] -> [S]."""
        return logits.argmax(-1)


class Ban:
    """Token 7 is never chosen."""

    def __init__(self, context: ProcessorContext) -> None:
        self.context = context

    def admit(self, state: SlotState) -> bool:
        """Applies to everyone."""
        return True

    def release(self, slot: int) -> None:
        """No state."""

    def fork(self, source: int, destination: int) -> None:
        """No state."""

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> None:
        """Forbid it."""
        logits[:, BANNED] = float("-inf")

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """No state."""
