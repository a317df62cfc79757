"""The manager's dealings with a store: what it could bring, what it is given, and what is on the way.

One storage entry is one block of tokens of one *part* of the geometry: all groups that keep every position together, and each
sliding-window or recurrent group by itself, since those hold a block only near some boundaries. A model with full groups only
has one entry per block. In a `KVTransfer`, entry i lists the blocks of its part's groups and -1 for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm_core.errors import IntegrityError
from xllm_core.kv.groups import KVGroup, block_at
from xllm_core.kv.keys import storage_key
from xllm_core.kv.prefix_tree import Node, PrefixTree
from xllm_core.kv.sequence import Lookup, SequenceKV
from xllm_core.plugins.contracts.kv import Hit, KVGeometry, KVIndex, Later
from xllm_core.types import KVTransfer


@dataclass(slots=True)
class _Part:
    """Groups that share one storage entry per block. name: as in the storage key; "" for those that keep every position."""

    name: str
    groups: list[KVGroup]

    def is_on_device(self, node: Node) -> bool:
        return all(node.blocks[group.index] is not None for group in self.groups)


@dataclass(slots=True)
class _Flight:
    """A transfer between its plan and its end. leased: (group, block). For a load also the rest.

    kv: whom it is for, None once that sequence is gone. path: nodes up to the target, empty after a reset. hit: how many of
    them the sequence had on the device.
    held: (group, block) that the flight references for the sequence: targets, and device blocks between hit and target.
    targets: (group, block, node) that the store writes.
    """

    is_load: bool
    leased: list[tuple[KVGroup, int]]
    kv: SequenceKV | None = None
    path: list[Node] = field(default_factory=list)
    hit: int = 0
    held: list[tuple[KVGroup, int]] = field(default_factory=list)
    targets: list[tuple[KVGroup, int, Node]] = field(default_factory=list)


class StoreLink:
    """Everything between the manager and a `KVIndex`. Called between steps, only where a store is chosen."""

    def __init__(self, index: KVIndex, geometry: KVGeometry, groups: Sequence[KVGroup], tree: PrefixTree) -> None:
        self._index = index
        self._groups = groups
        self._tree = tree
        self._fingerprint = geometry.fingerprint
        self._block_size = geometry.block_size
        full = [group for group in groups if group.spec.kind == "full"]
        self._full = _Part("", full) if full else None
        self._partial = [_Part(group.spec.name, [group]) for group in groups if group.spec.kind != "full"]
        self._flights: dict[int, _Flight] = {}
        self._next_ticket = 0
        self.num_loads = 0
        self.num_saves = 0
        self.num_failures = 0
        self.num_tokens = 0

    def extend(self, found: Lookup, limit: int) -> None:
        """Ask what the store has of blocks that the device lacks; sets `num_store_blocks` or `is_later`.

        found._keys holds the keys of all `limit` blocks.
        """
        hit = found.num_cached_tokens // self._block_size
        if any(node.num_loads for node in found._path[hit:]):
            found.is_later = True
            return
        end = self._longest_full(found, limit)
        num_before = -1
        while not found.is_later and end > hit and end != num_before:
            num_before = end
            for part in self._partial:
                end = self._longest_partial(part, found, hit, end)
        if not found.is_later and end > hit:
            found.num_store_blocks = end - hit

    def fits(self, found: Lookup) -> bool:
        """Is there room for the device hit of a lookup together with what the store would bring?"""
        hit = found.num_cached_tokens // self._block_size
        end = hit + found.num_store_blocks
        for group in self._groups:
            missing, present = self._split(group, found._path, hit, end)
            taken = [block_at(found._path[i], group.index) for i in (*group.needed(hit), *present)]
            # What is taken from the cache cannot be evicted to make the rest.
            if group.pool.num_available - sum(map(group.pool.is_evictable, taken)) < len(missing):
                return False
        return True

    def begin_load(self, found: Lookup, kv: SequenceKV) -> KVTransfer:
        """Reserve and lease the blocks that the store writes; `fits` said yes.

        kv holds the device hit already and keeps it, so that a failed load leaves it with that.
        """
        end = len(kv._path) + found.num_store_blocks
        path = self._grow_path(kv._path, found._keys[len(kv._path) : end])
        flight = _Flight(True, [], kv, path, hit=len(kv._path))
        # All that is on the device is referenced before anything is allocated, or it could be evicted in between.
        splits = [(group, *self._split(group, path, flight.hit, end)) for group in self._groups]
        for group, missing, present in splits:
            for i in present:
                block = block_at(flight.path[i], group.index)
                group.pool.acquire(block)
                flight.held.append((group, block))
            for i in missing:
                block = group.pool.allocate()
                group.pool.lease(block)
                flight.leased.append((group, block))
                flight.held.append((group, block))
                flight.targets.append((group, block, flight.path[i]))
        for node in path[flight.hit :]:
            node.num_loads += 1
        return self._depart(flight, self._load_entries(flight))

    def begin_save(self, kv: SequenceKV) -> KVTransfer | None:
        """Lease the published blocks of a sequence that the store wants; None when it wants nothing. Before kv is released."""
        offers: list[tuple[_Part, Node]] = [
            (part, node)
            for part in ([self._full] if self._full else []) + self._partial
            for node in kv._path
            if part.is_on_device(node)
        ]
        if not offers:
            return None
        wanted = self._index.wants([self._storage_key(part, node) for part, node in offers])
        flight = _Flight(False, [])
        entries: list[tuple[bytes, dict[int, int]]] = []
        for (part, node), is_wanted in zip(offers, wanted, strict=True):
            if not is_wanted:
                continue
            blocks = {group.index: block_at(node, group.index) for group in part.groups}
            entries.append((self._storage_key(part, node), blocks))
            for group in part.groups:
                group.pool.lease(blocks[group.index])
                flight.leased.append((group, blocks[group.index]))
        return self._depart(flight, entries) if entries else None

    def abandon(self, kv: SequenceKV) -> None:
        """The sequence of a load is gone: its targets stay leased until the store is done, and are published then."""
        if kv.ticket is None:
            return
        flight = self._flights[kv.ticket]
        flight.kv = None
        for group, block in flight.held:
            group.pool.drop(block)
        flight.held = []

    def finish(self, ticket: int, has_succeeded: bool) -> None:
        """A transfer ended: leases end; blocks of a load are published, and its sequence continues from them."""
        flight = self._flights.pop(ticket, None)
        if flight is None:
            raise IntegrityError(f"transfer {ticket} ended but is not in flight; in flight: {sorted(self._flights)}")
        self._index.finished(ticket, has_succeeded)
        self.num_failures += not has_succeeded
        if flight.is_load:
            self._land(flight, has_succeeded)
        for group, block in flight.leased:
            group.pool.unlease(block)

    def forget_nodes(self) -> None:
        """The tree is about to be cleared: what is on the way must not be published, nor used by its sequence."""
        for flight in self._flights.values():
            flight.path = []

    def counts(self, group: KVGroup) -> tuple[dict[int, int], dict[int, int]]:
        """References and leases per block of one group that flights account for; for integrity checks."""
        refs: dict[int, int] = {}
        leases: dict[int, int] = {}
        for flight in self._flights.values():
            for counts, pairs in ((refs, flight.held), (leases, flight.leased)):
                for owner, block in pairs:
                    if owner is group:
                        counts[block] = counts.get(block, 0) + 1
        return refs, leases

    def pins(self) -> list[Node]:
        """Nodes that flights pin; for integrity checks."""
        return [flight.path[-1] for flight in self._flights.values() if flight.is_load and flight.path]

    def _land(self, flight: _Flight, has_succeeded: bool) -> None:
        kv = flight.kv
        for node in flight.path[flight.hit :]:
            node.num_loads -= 1
        if has_succeeded and flight.path:
            for group, block, node in flight.targets:
                if node.blocks[group.index] is None:
                    if kv is None:
                        group.pool.acquire(block)  # only a held block may be found: nobody uses it any more
                    self._tree.attach(node, group.index, block)
                    group.pool.publish(block, node)
                    if kv is None:
                        group.pool.drop(block)
            if kv is not None:
                self._move_on(kv, flight)
        if kv is not None:
            kv.ticket = None
            for group, block in flight.held:
                group.pool.drop(block)
        if flight.path:
            self._tree.unpin(flight.path[-1])

    def _move_on(self, kv: SequenceKV, flight: _Flight) -> None:
        """Let the sequence hold the longer prefix instead of the device hit it started with."""
        end = len(flight.path)
        for group in self._groups:
            old = [block for block in kv._tables[group.index] if block >= 0]
            group.take(kv, flight.path, end)
            for block in reversed(old):
                group.pool.drop(block)
        self._tree.pin(flight.path[-1])
        if kv._path:
            self._tree.unpin(kv._path[-1])
        self.num_tokens += (end - len(kv._path)) * self._block_size
        kv._path = flight.path
        kv._num_committed = end
        kv._num_computed = kv.num_ready_tokens = end * self._block_size
        kv.next_commit_tokens = (end + 1) * self._block_size

    def _longest_full(self, found: Lookup, limit: int) -> int:
        """Blocks from the start that device or store have for all groups that keep every position."""
        if self._full is None:
            return limit
        start = 0
        while start < len(found._path) and self._full.is_on_device(found._path[start]):
            start += 1
        if start >= limit:
            return limit
        keys = [storage_key(key, self._fingerprint) for key in found._keys[start:limit]]
        answer = self._index.lookup(keys)
        found.is_later = isinstance(answer, Later)
        return start + min(answer.num_blocks, len(keys)) if isinstance(answer, Hit) else start

    def _longest_partial(self, part: _Part, found: Lookup, hit: int, end: int) -> int:
        """The longest prefix, at most `end` blocks, from which one group could continue with what device and store have."""
        group = part.groups[0]
        has = [i < len(found._path) and part.is_on_device(found._path[i]) for i in range(end)]
        names = {i: storage_key(found._keys[i], self._fingerprint, part.name) for i in range(hit, end) if not has[i]}
        held = self._index.held(list(names.values()))
        if isinstance(held, Later):
            found.is_later = True
            return end
        in_store = {i for i, is_held in zip(names, held, strict=True) if is_held}  # the lookup below decides
        while True:
            end = group.longest_hit([has[i] or i in in_store for i in range(end)], end)
            asked = [i for i in group.needed(end) if not has[i]]
            if end <= hit or not asked:
                return end
            answer = self._index.lookup([names[i] for i in asked])
            if isinstance(answer, Later):
                found.is_later = True
                return end
            num_found = answer.num_blocks if isinstance(answer, Hit) else 0
            if num_found >= len(asked):
                return end
            in_store.discard(asked[num_found])

    def _split(self, group: KVGroup, path: Sequence[Node], hit: int, end: int) -> tuple[list[int], list[int]]:
        """Of the blocks that `group` needs after `end` and the hit does not hold: which are missing, which on the device."""
        held = group.needed(hit)
        missing: list[int] = []
        present: list[int] = []
        for i in group.needed(end):
            if i < len(path) and path[i].blocks[group.index] is not None:
                if i not in held:
                    present.append(i)
            else:
                missing.append(i)
        return missing, present

    def _grow_path(self, path: Sequence[Node], keys: Sequence[bytes]) -> list[Node]:
        """Nodes for the target of a load; the last is pinned, and through it all."""
        grown = list(path)
        for key in keys:
            grown.append(self._tree.extend(grown[-1] if grown else self._tree.root, key))
        self._tree.pin(grown[-1])
        return grown

    def _load_entries(self, flight: _Flight) -> list[tuple[bytes, dict[int, int]]]:
        entries: dict[bytes, dict[int, int]] = {}
        for group, block, node in flight.targets:
            part = self._full if group.spec.kind == "full" else next(p for p in self._partial if p.groups[0] is group)
            if part is not None:
                entries.setdefault(self._storage_key(part, node), {})[group.index] = block
        return list(entries.items())

    def _storage_key(self, part: _Part, node: Node) -> bytes:
        if node.storage_keys is None:
            node.storage_keys = {}
        key = node.storage_keys.get(part.name)
        if key is None:
            key = node.storage_keys[part.name] = storage_key(node.key, self._fingerprint, part.name)
        return key

    def _depart(self, flight: _Flight, entries: Sequence[tuple[bytes, dict[int, int]]]) -> KVTransfer:
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        keys = [key for key, _ in entries]
        block_ids = [[blocks.get(g, -1) for _, blocks in entries] for g in range(len(self._groups))]
        transfer = KVTransfer(ticket, flight.is_load, keys, block_ids)
        self._flights[ticket] = flight
        self.num_loads += flight.is_load
        self.num_saves += not flight.is_load
        self._index.planned(transfer)
        return transfer
