"""Sampling parameters of all slots as columns, and the logits processors that each slot needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.sampling import LogitsProcessor, SamplingBatch
from xllm_core.types import SlotState

_NONE = torch.empty(0, dtype=torch.int64)


class SamplingState:
    """Entered, forked and left as plans say; a step gathers its rows with a few numpy look-ups."""

    def __init__(self, device: DeviceBackend, processors: Sequence[LogitsProcessor], *, num_slots: int) -> None:
        self._device = device
        self._processors = tuple(processors)
        self._members: list[set[int]] = [set() for _ in self._processors]
        self._temperature = np.zeros(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float32)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seed = np.zeros(num_slots, dtype=np.int64)
        self._index = np.zeros(num_slots, dtype=np.int64)
        self._num_logprobs = np.full(num_slots, -1, dtype=np.int64)
        # Slots of such a kind, or that were until they are taken again: most steps have none, and look no further.
        self._is_random: set[int] = set()
        self._has_logprobs: set[int] = set()

    def release(self, slots: Sequence[int]) -> None:
        """Sequences left these slots."""
        for processor, members in zip(self._processors, self._members, strict=True):
            for slot in slots:
                if slot in members:
                    members.remove(slot)
                    processor.release(slot)

    def admit(self, state: SlotState) -> None:
        """A sequence enters a slot, replacing what was there."""
        slot, params = state.slot, state.params
        self.release((slot,))
        self._temperature[slot] = params.temperature
        self._top_k[slot] = max(0, params.top_k)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = state.seed
        self._index[slot] = state.index
        self._num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        _mark(self._is_random, slot, params.temperature != 0)
        _mark(self._has_logprobs, slot, params.logprobs is not None)
        for processor, members in zip(self._processors, self._members, strict=True):
            if processor.admit(state):
                members.add(slot)

    def fork(self, source: int, destination: int, index: int) -> None:
        """`destination` samples like `source`, with the noise of its own index."""
        self.release((destination,))
        for column in (self._temperature, self._top_k, self._top_p, self._min_p, self._seed, self._num_logprobs):
            column[destination] = column[source]
        self._index[destination] = index
        for slots in (self._is_random, self._has_logprobs):
            _mark(slots, destination, source in slots)
        for processor, members in zip(self._processors, self._members, strict=True):
            if source in members:
                processor.fork(source, destination)
                members.add(destination)

    def process(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """Run every processor on its rows. logits: [S, V] float32, changed in place. Returns it."""
        for processor, members in zip(self._processors, self._members, strict=True):
            rows = [i for i, slot in enumerate(slots) if slot in members] if members else []
            if len(rows) == len(slots):
                processor.apply(logits, slots)
            elif rows:
                index = torch.tensor(rows, device=logits.device)
                part = logits[index]
                processor.apply(part, [slots[i] for i in rows])
                logits[index] = part
        return logits

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Tell processors what was chosen."""
        for processor, members in zip(self._processors, self._members, strict=True):
            if members:
                mine = [i for i, slot in enumerate(slots) if slot in members]
                if mine:
                    processor.observe([slots[i] for i in mine], [token_ids[i] for i in mine])

    @property
    def has_processors(self) -> bool:
        """Whether any slot needs any processor."""
        return any(self._members)

    def num_logprobs(self, slots: Sequence[int]) -> list[int] | None:
        """Likeliest tokens to report per sample, -1 for none at all; None if nobody in the batch asked."""
        if self._has_logprobs.isdisjoint(slots):
            return None
        counts = self._num_logprobs[np.asarray(slots, dtype=np.int64)]
        return counts.tolist() if (counts >= 0).any() else None

    def batch(self, slots: Sequence[int], positions: Sequence[int]) -> SamplingBatch:
        """Columns for the samples of one step."""
        if self._is_random.isdisjoint(slots):
            return SamplingBatch(True, None, None, None, None, _NONE, _NONE, _NONE)
        at = np.asarray(slots, dtype=np.int64)
        temperature = self._temperature[at]
        seeds, indices = torch.from_numpy(self._seed[at]), torch.from_numpy(self._index[at])
        where = torch.tensor(positions, dtype=torch.int64)
        top_k, top_p, min_p = self._top_k[at], self._top_p[at], self._min_p[at]
        to_device = self._device.to_device
        return SamplingBatch(
            is_all_greedy=False,
            temperature=to_device(torch.from_numpy(temperature)),
            top_k=to_device(torch.from_numpy(top_k)) if top_k.any() else None,
            top_p=to_device(torch.from_numpy(top_p)) if (top_p < 1).any() else None,
            min_p=to_device(torch.from_numpy(min_p)) if min_p.any() else None,
            seeds=seeds, indices=indices, positions=where,
        )  # fmt: skip


def _mark(slots: set[int], slot: int, is_in: bool) -> None:
    (slots.add if is_in else slots.discard)(slot)
