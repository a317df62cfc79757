"""Stand-ins shipped to plugin authors: a worker whose tokens tell whether its KV was right."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from xllm_core.plugins.contracts.kv import KVGeometry, KVMover, KVStore
from xllm_core.types import EngineRequest, KVTransfer, SlotState, StepPlan, StepResult, StepTimes

if TYPE_CHECKING:
    import torch

_FIRST = 1


def chain(before: int, token: int) -> int:
    """The checksum of a prefix with one more token; never 0, which means "never written"."""
    return zlib.crc32(token.to_bytes(4, "little"), before) | 1 << 40


def next_token(checksum: int, index: int, seed: int, *, is_seeded: bool, vocab_size: int) -> int:
    """What the fake model says after a prefix with this checksum."""
    noise = zlib.crc32(f"{seed} {index}".encode()) if is_seeded else 0
    return (checksum ^ noise) % vocab_size


def expected_tokens(request: EngineRequest, index: int, *, vocab_size: int, max_new: int) -> list[int]:
    """What a correct engine must give out for a sequence, new tokens only, without running one."""
    params = request.params
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))
    emitted = list(request.emitted[index]) if request.emitted else []
    checksum = _FIRST
    for token in [*request.prompt_token_ids, *emitted]:
        checksum = chain(checksum, token)
    new: list[int] = []
    while len(emitted) + len(new) < max_new:
        token = next_token(checksum, index, request.seed, is_seeded=params.temperature > 0, vocab_size=vocab_size)
        checksum = chain(checksum, token)
        new.append(token)
        if token in stops:
            break
    return new


@dataclass(slots=True)
class FakeHandle:
    """A forward of the fake. checksums: of each row's prefix, after its last token."""

    plan: StepPlan
    checksums: list[int]
    times: StepTimes = field(default_factory=StepTimes)


class ChecksumWorker:
    """An `engine.executor.StepWorker` whose "KV" of a position is the checksum of all tokens up to it, stored in blocks.

    A position's checksum is computed from what the block table *points at* for the position before, so a wrong block, a stale one, a missed
    copy on write, a lost token or a table that was never sent changes every token that follows. Sliding windows are read back to their first
    position. store: its mover copies the blocks as a device's would.
    """

    def __init__(self, geometry: KVGeometry, *, num_slots: int, vocab_size: int, store: KVStore | None = None) -> None:
        self._geometry = geometry
        self._vocab_size = vocab_size
        columns = max(geometry.num_blocks) + 1
        self.blocks: list[npt.NDArray[np.int64]] = [
            np.zeros((n, geometry.block_size), np.int64) for n in geometry.num_blocks
        ]
        self._tables = [np.full((num_slots, columns), -1, np.int64) for _ in geometry.groups]
        self._slots: dict[int, SlotState] = {}
        self._forks: dict[int, int] = {}
        self._previous: list[int] = []
        self._mover: KVMover | None = store.mover(self) if store is not None else None
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> FakeHandle:
        """Apply the plan's changes in the order that `StepPlan` promises, then compute its rows."""
        self.plans.append(plan)
        for slot in plan.released:
            self._slots.pop(slot, None)
        for state in plan.admitted:
            self._slots[state.slot] = state
            self._forks.pop(state.slot, None)
        for source, destination, index in plan.forked:
            self._slots[destination] = self._slots[source]
            self._forks[destination] = index
        for group, source, destination in plan.kv.copies:
            self.blocks[group][destination] = self.blocks[group][source]
        for group, slot, first, block_ids in plan.kv.table_writes:
            self._tables[group][slot, first : first + len(block_ids)] = block_ids
        if plan.kv.transfers and self._mover is not None:
            self._mover.start(plan.kv.transfers)
        given = iter(plan.token_ids)
        checksums = []
        for slot, start, length, previous in zip(plan.slots, plan.starts, plan.lengths, plan.prev_rows, strict=True):
            tokens = [self._previous[previous]] if previous >= 0 else [next(given) for _ in range(length)]
            checksums.append(self._compute(slot, start, tokens))
        return FakeHandle(plan, checksums, StepTimes(forward_ended_s=time.perf_counter()))

    def sample(self, handle: FakeHandle) -> StepResult:
        """The next token of every sample: a function of the prefix (and of seed and index, if the request is seeded)."""
        plan = handle.plan
        chosen = []
        for row, slot in zip(plan.sample_rows, plan.sample_slots, strict=True):
            state = self._slots[slot]
            index = self._forks.get(slot, state.index)
            is_seeded = state.params.temperature > 0
            chosen.append(
                next_token(handle.checksums[row], index, state.seed, is_seeded=is_seeded, vocab_size=self._vocab_size)
            )
        self._previous = chosen
        finished = self._mover.poll() if self._mover is not None else ()
        return StepResult([(token,) for token in chosen], finished_transfers=finished)

    def close(self) -> None:
        """End the mover."""
        if self._mover is not None:
            self._mover.close()

    def read_block(self, group: int, block_id: int) -> torch.Tensor:
        """One block as bytes, for a store's mover."""
        import torch

        return torch.from_numpy(self.blocks[group][block_id].copy()).view(torch.uint8)

    def write_block(self, group: int, block_id: int, data: torch.Tensor) -> None:
        """Restore what `read_block` returned."""
        self.blocks[group][block_id] = data.contiguous().numpy().view(np.int64)

    def _compute(self, slot: int, start: int, tokens: Sequence[int]) -> int:
        """Write the checksums of new positions into every group; returns the last. Groups must agree on what came before."""
        size = self._geometry.block_size
        checksum = _FIRST
        if start:
            seen = {
                int(self.blocks[g][self._tables[g][slot, (start - 1) // size], (start - 1) % size])
                for g in range(len(self.blocks))
            }
            checksum = seen.pop() if len(seen) == 1 else 0
        self._look_back(slot, start)
        for position, token in enumerate(tokens, start):
            checksum = chain(checksum, token)
            for group, blocks in enumerate(self.blocks):
                block = self._tables[group][slot, position // size]
                assert block >= 0, f"slot {slot} writes position {position} without a block in group {group}"
                blocks[block, position % size] = checksum
        return checksum

    def _look_back(self, slot: int, start: int) -> None:
        """All positions that attention would read must be there: the whole prefix, or the window."""
        size = self._geometry.block_size
        for group, spec in enumerate(self._geometry.groups):
            first = 0 if spec.window is None else max(0, start - spec.window + 1)
            for position in range(first, start):
                block = self._tables[group][slot, position // size]
                assert block >= 0, f"slot {slot} reads position {position} of group {group} through a hole"
                assert self.blocks[group][block, position % size], (
                    f"slot {slot} reads position {position}, which nobody wrote"
                )


@dataclass(slots=True)
class RecordingMover:
    """A mover that ends transfers only when told to. ended: (ticket, succeeded) to report at the next poll."""

    started: list[KVTransfer] = field(default_factory=list)
    ended: list[tuple[int, bool]] = field(default_factory=list)

    def start(self, transfers: Sequence[KVTransfer]) -> None:
        """Remember them."""
        self.started.extend(transfers)

    def poll(self) -> Sequence[tuple[int, bool]]:
        """What the test said has ended."""
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        """Nothing is held."""
