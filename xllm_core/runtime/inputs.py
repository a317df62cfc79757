"""From a plan to the tensors of one forward: a fixed row per sequence, gathered per step.

The block tables of all slots live in host buffers that only change where a plan says so; a step is then a few numpy gathers,
whatever its rows are doing. A decode step whose rows all go on is not gathered again, but moved by a position.
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
Longs = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepInputs:
    """One ragged batch, good until the next one is gathered. T tokens, R rows.

    token_ids, positions: [T] int64 on the device. kv_slots: per group [T] int64 on the device, slot of each new token.
    layouts: per group, what its attention kernel plans from. row_starts: [R + 1] host int32. is_resident: the tensors are parts of `ResidentInputs`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: dict[str, torch.Tensor]
    layouts: dict[str, BatchLayout]
    row_starts: Ints
    is_resident: bool = False


@dataclass(slots=True)
class ResidentInputs:
    """Tensors on the device that recorded graphs read: columns of `StepInputs`, [T] int64 with room for the largest step.

    filled: (rows, bucket) of a step behind whose rows nothing was written since the rest of the bucket was filled.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: dict[str, torch.Tensor]
    filled: tuple[int, int] = (0, 0)


class InputBuffers:
    """Host state of all slots of one worker. Not thread-safe; owned by the model runner.

    resident: what graphs read, where that is in the host's memory: decode steps are then made in it.
    """

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
        self._decode: _Decode | None = None
        self.resident: ResidentInputs | None = None

    def write_tables(self, writes: Sequence[tuple[int, int, int, list[int]]]) -> None:
        """Apply `KVChanges.table_writes`: (group, slot, first index, block ids)."""
        for group, slot, first, block_ids in writes:
            self._tables[group][slot, first : first + len(block_ids)] = block_ids
            if self._decode is not None and not self._decode.write(group, slot, first, block_ids):
                self._decode = None

    def gather(self, plan: StepPlan, previous: torch.Tensor, chosen: Sequence[int] | None) -> StepInputs:
        """The batch of a plan that has rows. previous: [S] tokens sampled by the step before, on the device; chosen: the same on the host, None
        while only the device knows them.
        """
        if self._decode is not None and self._decode.goes_on(plan, len(previous if chosen is None else chosen)):
            return self._decode.move(self._device, previous, chosen)
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
        kv_lens = starts + lengths
        width = -(-max(map(add, plan.starts, plan.lengths)) // self._block_size)
        tables = [table[slots, :width] for table in self._tables]
        host = [positions, *[self._flat(group, token_slots, positions) for group in range(len(self._groups))]]
        resident = self._resident(host, token_ids) if num_tokens == num_rows else None
        on_device = resident if resident is not None else [token_ids, *map(self._to_device, host)]
        shared = (torch.from_numpy(lengths), torch.from_numpy(kv_lens), torch.from_numpy(row_starts))
        names = [spec.name for spec in self._groups]
        layouts = {n: BatchLayout(*shared, torch.from_numpy(t)) for n, t in zip(names, tables, strict=True)}
        kv_slots = dict(zip(names, on_device[2:], strict=True))
        inputs = StepInputs(on_device[0], on_device[1], kv_slots, layouts, row_starts, resident is not None)
        self._decode = None
        if num_tokens == num_rows:
            self._decode = _Decode(plan, inputs, self._groups, self._block_size, host, kv_lens, tables)
        return inputs

    def _resident(self, host: list[Longs], token_ids: torch.Tensor) -> list[torch.Tensor] | None:
        """Token ids and the arrays of a decode step as parts of what graphs read, `host` now being those; None if they do not fit."""
        kept, num_rows = self.resident, len(token_ids)
        names = [spec.name for spec in self._groups]
        if kept is None or num_rows > len(kept.token_ids) or kept.kv_slots.keys() != set(names):
            return None
        slots = [kept.kv_slots[name] for name in names]
        parts = [tensor[:num_rows] for tensor in (kept.token_ids, kept.positions, *slots)]
        kept.filled = (0, 0)
        parts[0].copy_(token_ids)
        for i, part in enumerate(parts[1:]):
            array = part.numpy()
            array[:] = host[i]
            host[i] = array
        return parts

    def _flat(self, group: int, token_slots: Longs, positions: Longs) -> Longs:
        """[T] slots of the group's cache."""
        table, size = self._tables[group], self._block_size
        is_paged = self._groups[group].kind != "recurrent"
        index = positions // size if is_paged else 0
        flat: Longs = table[token_slots, index].astype(np.int64)
        return flat * size + (positions - index * size) if is_paged else flat

    def _to_device(self, host: Longs) -> torch.Tensor:
        return self._device.to_device(torch.from_numpy(host))

    def _tokens(self, plan: StepPlan, row_starts: Ints, previous: torch.Tensor) -> torch.Tensor:
        num_tokens = plan.num_tokens
        given = np.array(plan.token_ids, dtype=np.int64)
        if len(given) == num_tokens:
            return self._to_device(given)
        prev_rows = np.array(plan.prev_rows, dtype=np.int64)
        waits = prev_rows >= 0  # rows whose one token the previous step sampled; it never leaves the device
        token_ids = np.zeros(num_tokens, dtype=np.int64)
        is_given = np.ones(num_tokens, dtype=bool)
        is_given[row_starts[:-1][waits]] = False
        token_ids[is_given] = given
        on_device = self._to_device(token_ids)
        where = self._to_device(row_starts[:-1][waits].astype(np.int64))
        on_device[where] = previous[self._to_device(prev_rows[waits])]
        return on_device


class _Decode:
    """A decode step, of which the next one is made in place if every row goes on with what was sampled for it.

    By loops over plain memory: between two steps the processor's caches have forgotten every library, and the first sum that numpy is asked for
    takes as long as this does for a hundred rows. host: positions, then the slots of each group; inputs: what was made of them.
    """

    def __init__(
        self, plan: StepPlan, inputs: StepInputs, groups: Sequence[KVGroupSpec], block_size: int, host: list[Longs], kv_lens: Ints,
        tables: list[Ints],
    ) -> None:  # fmt: skip
        self._inputs = inputs
        self._slots, self._order = plan.slots, list(range(len(plan.slots)))
        self._block_size = block_size
        self._width = tables[0].shape[1]
        self._num_left = self._width * block_size - int(kv_lens.max())  # steps for which the tables are wide enough
        self._is_rewritten = False  # a table, and maybe the block that a row is in the middle of
        self._host = host
        self._positions, self._kv_lens = host[0].data, kv_lens.data
        self._paged = {
            group: (host[1 + group].data, table.data)
            for group, table in enumerate(tables)
            if groups[group].kind != "recurrent"
        }
        self._names = [spec.name for spec in groups]
        self._token_ids = inputs.token_ids.numpy().data if inputs.is_resident else None

    def goes_on(self, plan: StepPlan, num_chosen: int) -> bool:
        """Whether the plan says so, and the tables are wide enough."""
        return (
            self._num_left > 0
            and num_chosen == len(self._order)
            and plan.slots == self._slots
            and plan.prev_rows == self._order
        )

    def move(self, device: DeviceBackend, previous: torch.Tensor, chosen: Sequence[int] | None) -> StepInputs:
        """The next step, in the tensors of this one."""
        size, positions, kv_lens, inputs = self._block_size, self._positions, self._kv_lens, self._inputs
        is_rewritten, self._is_rewritten = self._is_rewritten, False
        self._num_left -= 1
        for row in self._order:
            positions[row] += 1
            kv_lens[row] += 1
        for flat, table in self._paged.values():
            for row in self._order:
                index, offset = divmod(positions[row], size)
                flat[row] = flat[row] + 1 if offset and not is_rewritten else table[row, index] * size + offset
        if self._token_ids is not None and chosen is not None:
            for row in self._order:
                self._token_ids[row] = chosen[row]
            return inputs
        inputs.token_ids = previous
        inputs.positions, *slots = (device.to_device(torch.from_numpy(array)) for array in self._host)
        inputs.kv_slots = dict(zip(self._names, slots, strict=True))
        return inputs

    def write(self, group: int, slot: int, first: int, block_ids: list[int]) -> bool:
        """Take over what was written to a table. False if that cannot be done."""
        if slot not in self._slots:
            return True
        if group not in self._paged:
            return False
        row, (_, table) = self._slots.index(slot), self._paged[group]
        for index, block in enumerate(block_ids[: max(0, self._width - first)], first):
            table[row, index] = block
        self._is_rewritten = True
        return True
