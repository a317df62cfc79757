"""A device that really holds what blocks contain, and a small engine around the real manager and the real host store.

Every slot of a block is written with a hash of all tokens up to it, whoever writes: so a wrong block, a stale block, a missed copy
on write, a hole inside a window or a snapshot of the wrong moment is seen as wrong content by the forward that reads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from xllm_core.kv.host_store import HostStore
from xllm_core.kv.manager import KVManager, Lookup, SequenceKV
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec, KVTensorSpec
from xllm_core.types import KVChanges, KVTransfer

BLOCK_SIZE = 4
WINDOW = 6
POISON = np.uint64(0xDEAD)
SHAPES = {
    "full": ("full",),
    "full+window": ("full", "sliding_window"),
    "window": ("sliding_window",),
    "full+window+recurrent": ("full", "sliding_window", "recurrent"),
}


def build_geometry(kinds: Sequence[str], num_blocks: int | Sequence[int], fingerprint: str = "f0") -> KVGeometry:
    """One group per kind; a slot, or a recurrent state, is one uint64."""
    groups = tuple(
        KVGroupSpec(
            f"{kind}{g}",
            kind,
            (g,),
            (KVTensorSpec("hash", (1,), "uint64"),),
            WINDOW if kind == "sliding_window" else None,
        )
        for g, kind in enumerate(kinds)
    )
    counts = (num_blocks,) * len(kinds) if isinstance(num_blocks, int) else tuple(num_blocks)
    sizes = tuple(8 if kind == "recurrent" else 8 * BLOCK_SIZE for kind in kinds)
    return KVGeometry(groups, BLOCK_SIZE, counts, sizes, "test", fingerprint)


def prefix_hashes(tokens: Sequence[int]) -> list[np.uint64]:
    """hashes[n] names the first n tokens."""
    value, hashes = 1469598103934665603, [np.uint64(0)]
    for token in tokens:
        value = ((value ^ (token + 1)) * 1099511628211 + 12345) & (2**64 - 1)
        hashes.append(np.uint64(value))
    return hashes


class HashDevice:
    """Blocks, block tables, and a forward that checks all that it reads. Also the `KVView` of a store."""

    def __init__(self, geometry: KVGeometry, num_slots: int = 64) -> None:
        self.geometry = geometry
        self.cache = [
            np.full((count, 1 if group.kind == "recurrent" else geometry.block_size), POISON)
            for group, count in zip(geometry.groups, geometry.num_blocks, strict=True)
        ]
        self.tables = [[[] for _ in range(num_slots)] for _ in geometry.groups]

    def apply(self, changes: KVChanges) -> None:
        for group, source, target in changes.copies:
            assert source != target
            self.cache[group][target] = self.cache[group][source]
        for group, slot, first, blocks in changes.table_writes:
            table = self.tables[group][slot]
            assert first <= len(table), f"a table write at {first} leaves a gap after {len(table)}"
            table[first : first + len(blocks)] = blocks

    def forward(self, slot: int, tokens: Sequence[int], start: int, length: int) -> None:
        """Compute positions start .. start + length - 1; asserts that each sees what its prefix says."""
        hashes, size, end = prefix_hashes(tokens), self.geometry.block_size, start + length
        for g, group in enumerate(self.geometry.groups):
            table, cache = self.tables[g][slot], self.cache[g]
            if group.kind == "recurrent":
                assert start == 0 or cache[table[0], 0] == hashes[start], f"{group.name}: state before {start} is wrong"
                cache[table[0], 0] = hashes[end]
                continue
            for position in range(start, end):
                assert table[position // size] >= 0, f"{group.name}: position {position} is written to a hole"
                cache[table[position // size], position % size] = hashes[position + 1]
            first = 0 if group.window is None else max(0, start - group.window + 1)
            for position in range(first, end):
                block = table[position // size]
                assert block >= 0, f"{group.name}: position {position} of [{start}, {end}) is in a hole"
                assert cache[block, position % size] == hashes[position + 1], (
                    f"{group.name}: position {position} is wrong"
                )

    def read_block(self, group: int, block_id: int) -> torch.Tensor:
        return torch.from_numpy(self.cache[group][block_id].view(np.uint8).copy())

    def write_block(self, group: int, block_id: int, data: torch.Tensor) -> None:
        self.cache[group][block_id] = data.numpy().view(np.uint64)


@dataclass(eq=False)
class Run:
    """A sequence as a scheduler keeps it."""

    tokens: list[int]
    kv: SequenceKV
    num_computed: int
    must_wait: bool = False  # shares a tail that this plan's forward writes


@dataclass
class Bench:
    """What a scheduler and a worker do, over the real manager; one plan is open at any time."""

    geometry: KVGeometry
    store: HostStore | None = None
    manager: KVManager = field(init=False)

    def __post_init__(self) -> None:
        self.manager = KVManager(self.geometry, index=self.store.index() if self.store else None)
        self.device = HashDevice(self.geometry)
        self.mover = self.store.mover(self.device) if self.store else None
        self.runs: list[Run] = []
        self.loading: list[Run] = []
        self.plan: list[tuple[Run, int, int]] = []
        self.forks: list[tuple[Run, Run]] = []
        self.waiting_transfers: list[KVTransfer] = []
        self.slots = list(range(64))

    def lookup(self, tokens: Sequence[int], salt: str = "") -> Lookup:
        found = self.manager.lookup(tokens, salt=salt)
        assert found.num_cached_tokens % BLOCK_SIZE == 0 or found.num_cached_tokens == len(tokens) - 1
        assert found.num_cached_tokens + found.num_store_blocks * BLOCK_SIZE < max(1, len(tokens))
        return found

    def admit(self, tokens: Sequence[int], chunk: int = 10**6, salt: str = "") -> Run | None:
        found = self.lookup(tokens, salt)
        start = found.num_cached_tokens
        end = min(len(tokens), start + chunk)
        before = self.fingerprint()
        kv = self.manager.admit(found, tokens, end, self.slots[-1])
        if kv is None:
            assert self.fingerprint() == before, "a refused admit left a trace"
            return None
        assert kv.slot == self.slots.pop() and kv.num_ready_tokens == start and kv.capacity_tokens >= end
        run = Run(list(tokens), kv, start)
        self.runs.append(run)
        self.plan.append((run, start, end - start))
        return run

    def load(self, tokens: Sequence[int]) -> Run | None:
        found = self.lookup(tokens)
        if not found.num_store_blocks:
            return None
        before = self.fingerprint()
        kv = self.manager.load(found, tokens)
        if kv is None:
            assert self.fingerprint() == before, "a refused load left a trace"
            return None
        assert kv.ticket is not None and kv.slot == -1
        run = Run(list(tokens), kv, 0)
        self.loading.append(run)
        return run

    def place(self, run: Run, chunk: int = 10**6) -> bool:
        start = run.kv.num_ready_tokens
        end = min(len(run.tokens), start + chunk)
        before = self.fingerprint()
        if not self.manager.place(run.kv, self.slots[-1], end):
            assert self.fingerprint() == before, "a refused place left a trace"
            return False
        self.slots.pop()
        self.loading.remove(run)
        self.runs.append(run)
        run.num_computed = start
        self.plan.append((run, start, end - start))
        return True

    def advance(self, run: Run, chunk: int) -> bool:
        """Plan the next tokens of a run, as a scheduler does: ask only beyond the capacity."""
        if run.must_wait or any(planned is run for planned, _, _ in self.plan):
            return False
        end = min(len(run.tokens), run.num_computed + chunk)
        if end > run.kv.capacity_tokens:
            before = self.fingerprint(but_windows=True)
            if not self.manager.reserve(run.kv, end):
                assert self.fingerprint(but_windows=True) == before, "a refused reserve left a trace"
                return False
            assert run.kv.capacity_tokens >= end
        self.plan.append((run, run.num_computed, end - run.num_computed))
        return True

    def fork(self, run: Run) -> Run:
        twin = Run(run.tokens.copy(), self.manager.fork(run.kv, self.slots.pop()), run.num_computed)
        self.runs.append(twin)
        if any(planned is run for planned, _, _ in self.plan):
            self.forks.append((run, twin))
            twin.must_wait = True
        return twin

    def rewind(self, run: Run, num_tokens: int) -> bool:
        before = self.fingerprint()
        if not self.manager.rewind(run.kv, num_tokens):
            assert self.fingerprint() == before, "a refused rewind left a trace"
            return False
        run.num_computed = num_tokens
        del run.tokens[num_tokens:]
        return True

    def release(self, run: Run) -> None:
        if run in self.runs:
            self.runs.remove(run)
            self.slots.append(run.kv.slot)
        else:
            self.loading.remove(run)
        for source, twin in [pair for pair in self.forks if run in pair]:
            self.forks.remove((source, twin))
            if twin in self.runs:
                self.release(twin)  # what it waited for is not computed now
        self.plan = [row for row in self.plan if row[0] is not run]
        self.manager.release(run.kv)

    def step(self, next_token: Callable[[Run], int] = lambda run: 0) -> None:
        """Apply and run the open plan, commit what was computed, sample where all known tokens are computed."""
        changes = self.manager.take_changes()
        self.device.apply(changes)
        self.waiting_transfers += changes.transfers
        self.poison_free_blocks()
        rows, self.plan = self.plan, []
        for run, start, length in rows:
            self.device.forward(run.kv.slot, run.tokens, start, length)
            run.num_computed = start + length
        for source, twin in self.forks:
            twin.num_computed, twin.must_wait = source.num_computed, False
        done = [run for run, _, _ in rows] + [twin for _, twin in self.forks]
        self.forks = []
        for run in done:
            if run.num_computed >= run.kv.next_commit_tokens:
                self.manager.commit(run.kv, run.tokens, run.num_computed)
        for run in done:
            if run.num_computed == len(run.tokens):
                run.tokens.append(next_token(run))

    def run_transfers(self, has_succeeded: Callable[[KVTransfer], bool] = lambda transfer: True) -> None:
        """The mover gets what plans held back so far, and is done before this returns; or the transfer fails unseen by it."""
        transfers, self.waiting_transfers = self.waiting_transfers, []
        for transfer in transfers:
            if not has_succeeded(transfer):
                self.manager.finish_transfer(transfer.ticket, False)
                continue
            self.mover.start([transfer])
            deadline = time.monotonic() + 10
            while not (ended := self.mover.poll()):
                assert time.monotonic() < deadline, f"{transfer} does not end"
                time.sleep(0.0001)
            for ticket, is_good in ended:
                self.manager.finish_transfer(ticket, is_good)

    def poison_free_blocks(self) -> None:
        """Nobody may count on what a free block holds; no copy is queued at this moment."""
        for group in self.manager._groups:
            free = list(group.pool._free)
            self.device.cache[group.index][free] = POISON

    def fingerprint(self, but_windows: bool = False) -> object:
        """All that a refused call must leave as it was."""
        groups = [g for g in self.manager._groups if not (but_windows and g.spec.kind == "sliding_window")]
        changes = self.manager._changes
        return (
            [
                (g.pool.refs.copy(), g.pool.leases.copy(), list(g.pool.owners), g.pool.lru(), g.pool._free.copy())
                for g in groups
            ],
            sorted((key, node.num_pins, node.num_loads) for key, node in self.manager._tree.nodes.items()),
            [
                (id(kv), kv.capacity_tokens, kv.next_commit_tokens, kv.ticket, kv.slot)
                for kv in sorted(self.manager._live, key=id)
            ],
            [[kv._tables[g.index].copy() for g in groups] for kv in sorted(self.manager._live, key=id)],
            (len(changes.copies), len(changes.transfers), 0 if but_windows else len(changes.table_writes)),
        )

    def close(self) -> None:
        if self.mover is not None:
            self.mover.close()


BenchFactory = Callable[..., Bench]


@pytest.fixture(scope="session")
def geometry_of() -> Callable[..., KVGeometry]:
    return build_geometry


@pytest.fixture(scope="session")
def new_bench() -> BenchFactory:
    """new_bench(shape, num_blocks, store_bytes=0): a bench over one of SHAPES; with a host store if it gets bytes."""

    def build(shape: str, num_blocks: int | Sequence[int], store_bytes: int = 0) -> Bench:
        geometry = build_geometry(SHAPES[shape], num_blocks)
        return Bench(geometry, HostStore({"host_store_bytes": store_bytes}, geometry) if store_bytes else None)

    return build
