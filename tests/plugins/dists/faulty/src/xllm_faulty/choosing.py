"""A sampler and logits processors, each with a fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from xllm_core.plugins import ProcessorContext, SamplingBatch
from xllm_core.runtime.sampler import GumbelSampler
from xllm_core.types import SlotState


class Mates(GumbelSampler):
    """The hottest row of a batch heats all of them."""

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        if batch.temperature is not None:
            hottest = batch.temperature.max()
            batch = replace(batch, temperature=torch.where(batch.temperature > 0, hottest, batch.temperature))
        return super().sample(logits, batch)


class TooCold(GumbelSampler):
    """Divides by the temperature twice."""

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        if batch.temperature is not None:
            batch = replace(batch, temperature=batch.temperature**2)
        return super().sample(logits, batch)


class _Counts:
    """Adds to each token how often it was said."""

    def __init__(self, context: ProcessorContext) -> None:
        self._rows: dict[int, torch.Tensor] = {}
        self._vocab = context.vocab_size

    def admit(self, state: SlotState) -> bool:
        row = torch.zeros(self._vocab)
        row[state.slot + len(state.prompt_token_ids)] = 1.0
        for token in state.output_token_ids:
            row[token] += 1
        self._rows[state.slot] = row
        return True

    def release(self, slot: int) -> None:
        del self._rows[slot]

    def fork(self, source: int, destination: int) -> None:
        self._rows[destination] = self._rows[source].clone()

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> None:
        for row, slot in enumerate(slots):
            logits[row] += self._rows[slot]

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        for slot, token in zip(slots, token_ids, strict=True):
            self._rows[slot][token] += 1


class ForeignRows(_Counts):
    """Takes a slot for a row."""

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> None:
        for slot in slots:
            logits[slot % len(logits)] += self._rows[slot]


class SharedForks(_Counts):
    """A fork and its source count on one sheet."""

    def fork(self, source: int, destination: int) -> None:
        self._rows[destination] = self._rows[source]


class StaleSlots(_Counts):
    """A sequence that enters goes on with the counts of the one before."""

    def admit(self, state: SlotState) -> bool:
        before: Any = self._rows.get(state.slot)
        super().admit(state)
        if before is not None:
            self._rows[state.slot] += before
        return True

    def release(self, slot: int) -> None:
        """Kept."""
