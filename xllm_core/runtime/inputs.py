"""From a plan to the tensors of one forward: a fixed row per sequence, gathered per step.

The block tables of all slots live in host buffers that only change where a plan says so; a step is then a few numpy gathers,
whatever its rows are doing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

import numpy as np
import numpy.typing as npt
import torch

from xllm_core.plugins.contracts.attention import BatchLayout
from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.kv import KVGroupSpec
from xllm_core.types import StepPlan

Ints = npt.NDArray[np.int32]


@dataclass(slots=True)
class StepInputs:
    """One ragged batch. T tokens, R rows.

    token_ids, positions: [T] int64 on the device. kv_slots: per group [T] int64 on the device, slot of each new token.
    layouts: per group, what its attention kernel plans from. row_starts: [R + 1] host int32.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: dict[str, torch.Tensor]
    layouts: dict[str, BatchLayout]
    row_starts: Ints


class InputBuffers:
    """Host state of all slots of one worker. Not thread-safe; owned by the model runner."""

    def __init__(
        self, device: DeviceBackend, groups: Sequence[KVGroupSpec], *, num_slots: int, max_model_len: int, block_size: int,
    ) -> None:  # fmt: skip
        self._device = device
        self._groups = tuple(groups)
        self._block_size = block_size
        self._ones = np.ones(num_slots, dtype=np.int32)
        self._counting = np.arange(num_slots + 1, dtype=np.int32)
        # A sequence's last block may be reserved beyond the context by a speculative step: one spare column.
        self.max_blocks = -(-max_model_len // block_size) + 1
        self._tables: list[Ints] = [np.full((num_slots, self.max_blocks), -1, dtype=np.int32) for _ in self._groups]

    def write_tables(self, writes: Sequence[tuple[int, int, int, list[int]]]) -> None:
        """Apply `KVChanges.table_writes`: (group, slot, first index, block ids)."""
        for group, slot, first, block_ids in writes:
            self._tables[group][slot, first : first + len(block_ids)] = block_ids

    def gather(self, plan: StepPlan, previous: torch.Tensor) -> StepInputs:
        """Build the batch of a plan that has rows. previous: [S, W] tokens sampled by the step before, on the device."""
        num_rows, num_tokens = len(plan.slots), plan.num_tokens
        slots = np.array(plan.slots, dtype=np.int64)
        starts = np.array(plan.starts, dtype=np.int32)
        if num_tokens == num_rows:
            lengths, row_starts = self._ones[:num_rows], self._counting[: num_rows + 1]
            positions, token_slots = starts.astype(np.int64), slots
        else:
            lengths = np.array(plan.lengths, dtype=np.int32)
            row_starts = np.zeros(num_rows + 1, dtype=np.int32)
            np.cumsum(lengths, out=row_starts[1:])
            positions = np.repeat(starts - row_starts[:-1], lengths) + np.arange(num_tokens, dtype=np.int64)
            token_slots = np.repeat(slots, lengths)
        token_ids = self._tokens(plan, row_starts, previous)
        longest = max(map(add, plan.starts, plan.lengths))
        kv_slots, layouts = self._layouts(slots, starts, lengths, row_starts, positions, token_slots, longest)
        to_device = self._device.to_device
        return StepInputs(token_ids, to_device(torch.from_numpy(positions)), kv_slots, layouts, row_starts)

    def _tokens(self, plan: StepPlan, row_starts: Ints, previous: torch.Tensor) -> torch.Tensor:
        num_tokens = plan.num_tokens
        if num_tokens == len(previous) and plan.prev_rows == list(range(num_tokens)):
            return previous[:, 0].contiguous()  # all go on, in the same places
        given = np.array(plan.token_ids, dtype=np.int64)
        if len(given) == num_tokens:
            return self._device.to_device(torch.from_numpy(given))
        prev_rows = np.array(plan.prev_rows, dtype=np.int64)
        waits = prev_rows >= 0  # rows whose one token the previous step sampled; it never leaves the device
        token_ids = np.zeros(num_tokens, dtype=np.int64)
        is_given = np.ones(num_tokens, dtype=bool)
        is_given[row_starts[:-1][waits]] = False
        token_ids[is_given] = given
        on_device = self._device.to_device(torch.from_numpy(token_ids))
        where = self._device.to_device(torch.from_numpy(row_starts[:-1][waits].astype(np.int64)))
        which = self._device.to_device(torch.from_numpy(prev_rows[waits]))
        on_device[where] = previous[which, 0]
        return on_device

    def _layouts(
        self, slots: npt.NDArray[np.int64], starts: Ints, lengths: Ints, row_starts: Ints, positions: npt.NDArray[np.int64],
        token_slots: npt.NDArray[np.int64], longest: int,
    ) -> tuple[dict[str, torch.Tensor], dict[str, BatchLayout]]:  # fmt: skip
        size = self._block_size
        kv_lens = starts + lengths
        width = -(-longest // size)
        shared = (torch.from_numpy(lengths), torch.from_numpy(kv_lens), torch.from_numpy(row_starts))
        kv_slots: dict[str, torch.Tensor] = {}
        layouts: dict[str, BatchLayout] = {}
        for spec, table in zip(self._groups, self._tables, strict=True):
            if spec.kind == "recurrent":
                flat = table[token_slots, 0].astype(np.int64)
            else:
                index = positions // size
                flat = table[token_slots, index].astype(np.int64) * size + (positions - index * size)
            kv_slots[spec.name] = self._device.to_device(torch.from_numpy(flat))
            layouts[spec.name] = BatchLayout(*shared, torch.from_numpy(table[slots, :width]))
        return kv_slots, layouts
