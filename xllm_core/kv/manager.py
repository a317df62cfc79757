"""The one face of the KV cache that the scheduler sees: look up, admit, reserve, commit, fork, rewind, release.

Every call is all or nothing. Nothing here touches a tensor: what the worker must do is collected as `KVChanges`, which it applies
before the forward of the same plan, in order: copies, table writes, transfers. Three rules make blocks safe to hand out
again at once, though copies out of them may still be queued:

- copies run in the order queued, so a later copy into a block cannot overtake an earlier one out of it;
- forwards and loads come after all copies of their plan;
- what a transfer reads or writes is leased until its end is reported, and leased blocks are neither evicted nor written.

`commit` speaks of the forward that has just run, so a snapshot copy queued by it reads a working state before the next forward
overwrites it. That holds as long as no later forward has been launched when commit is called.

Two sequences that compute the same prefix at the same time both keep their blocks. The tree knows the first one's; the
second one's stay private, and take the place when the first ones have been evicted by the time the second lets go.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_core.errors import ConfigError, IntegrityError
from xllm_core.kv.groups import UNBOUNDED_TOKENS, KVGroup, RecurrentGroup, block_at, build_group
from xllm_core.kv.keys import BlockKeys
from xllm_core.kv.prefix_tree import Node, PrefixTree
from xllm_core.kv.sequence import KVStats, Lookup, SequenceKV
from xllm_core.kv.transfer import StoreLink
from xllm_core.plugins.contracts.kv import KVGeometry, KVIndex
from xllm_core.types import KVChanges

__all__ = ["KVManager", "KVStats", "Lookup", "SequenceKV"]


class KVManager:
    """Which blocks hold which tokens of which sequence, for all KV groups of one engine.

    index: the scheduler's side of a store, None for no store; needs the prefix cache.
    max_chunk_tokens: the most tokens of one sequence that a step computes, None for no limit. Known, it lets sequences grow
        beyond the pool of a sliding window, which then holds window and chunk only.
    Raises ConfigError for a geometry or a combination that cannot work.
    """

    capacity_tokens: int  # the longest single sequence that can ever fit, over all groups

    def __init__(
        self,
        geometry: KVGeometry,
        *,
        enable_prefix_cache: bool = True,
        index: KVIndex | None = None,
        max_chunk_tokens: int | None = None,
    ) -> None:
        if not geometry.groups or len(geometry.groups) != len(geometry.num_blocks):
            raise ConfigError(
                f"KV geometry has {len(geometry.groups)} groups and {len(geometry.num_blocks)} block counts; "
                "a model declares at least one group, and the device sizes each"
            )
        if geometry.block_size < 1 or min(geometry.num_blocks) < 1:
            raise ConfigError(
                f"KV cache of {geometry.num_blocks} blocks of {geometry.block_size} tokens holds nothing; "
                "raise [kv] memory_bytes or num_blocks"
            )
        if index is not None and not enable_prefix_cache:
            raise ConfigError("a KV store needs [kv] enable_prefix_cache = true: blocks are found by their prefix")
        self.geometry = geometry
        self.block_size = geometry.block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._keys = BlockKeys(geometry.block_size)
        self._tree = PrefixTree(len(geometry.groups))
        self._groups = [
            build_group(g, spec, geometry.num_blocks[g], geometry.block_size, self._tree)
            for g, spec in enumerate(geometry.groups)
        ]
        self._store = StoreLink(index, geometry, self._groups, self._tree) if index is not None else None
        self._changes = KVChanges()
        self._live: set[SequenceKV] = set()
        self._num_query_tokens = 0
        self._num_hit_tokens = 0
        self.capacity_tokens = min(self._group_capacity(group, max_chunk_tokens) for group in self._groups)

    def lookup(
        self,
        token_ids: Sequence[int],
        *,
        salt: str = "",
        use_cache: bool = True,
        use_store: bool = True,
        previous: Lookup | None = None,
    ) -> Lookup:
        """What is there of these tokens. Changes nothing and references nothing.

        use_cache False ignores cache and store (all positions are to be computed); what is computed is still published.
        previous: an earlier lookup of a prefix of these tokens with this salt, however old; spares hashing them again.
        """
        found = Lookup(_suffix=self._keys.suffix(salt=salt), _generation=self._tree.generation)
        known = previous._keys if previous is not None and previous._suffix == found._suffix else ()
        if not use_cache or not self.enable_prefix_cache:
            return found
        limit = max(0, len(token_ids) - 1) // self.block_size  # at least one token is computed, for its logits
        asks_store = use_store and self._store is not None
        nodes, size, key, is_known = self._tree.nodes, self.block_size, b"", True
        for i in range(limit):
            if i < len(known):
                key = known[i]
            else:
                key = self._keys.key(key, token_ids[i * size : (i + 1) * size], found._suffix)
            node = nodes.get(key) if is_known else None
            if node is not None:
                found._path.append(node)
            elif not asks_store:
                break
            else:
                is_known = False
            found._keys.append(key)
        found.num_cached_tokens = self._longest_hit(found._path) * size
        if asks_store and self._store is not None:
            self._store.extend(found, limit)
        if found.num_cached_tokens == limit * size and len(token_ids) == (limit + 1) * size:
            self._find_tail(found, key, token_ids)
        return found

    def _find_tail(self, found: Lookup, parent_key: bytes, token_ids: Sequence[int]) -> None:
        """A prompt that ends with a block that is known as well: all of it but its last token is there.

        That token's KV is written to a copy of the block. Only where every position is kept can a sequence begin inside a block.
        """
        size = self.block_size
        if size == 1 or any(group.spec.kind != "full" for group in self._groups):
            return
        node = self._tree.nodes.get(self._keys.key(parent_key, token_ids[-size:], found._suffix))
        if node is not None and all(block is not None for block in node.blocks):
            found._tail = node
            found.num_cached_tokens = len(token_ids) - 1

    def admit(self, found: Lookup, token_ids: Sequence[int], num_tokens: int, slot: int) -> SequenceKV | None:
        """Give a sequence a slot, the blocks of its device hit, and room for positions below `num_tokens`.

        found: the lookup of these `token_ids`, newer than the manager's last change. None: no room now, and no trace.
        """
        self._check_fresh(found)
        if not self._fits(found, num_tokens):
            return None
        kv = self._begin(found, token_ids, slot)
        for group in self._groups:
            self._write_table(group, kv)
        self._make_room(kv, num_tokens)
        return kv

    def load(self, found: Lookup, token_ids: Sequence[int]) -> SequenceKV | None:
        """Begin to bring `found.num_store_blocks` from the store, for a sequence that waits without a slot.

        The handle holds the device hit, and room for what comes; `ticket` is set until `finish_transfer`. None: no room now.
        """
        self._check_fresh(found)
        if self._store is None or found.num_store_blocks < 1:
            raise IntegrityError(
                f"load of {found.num_store_blocks} blocks: only what a lookup found in a store can be loaded"
            )
        if not self._store.fits(found):
            return None
        kv = self._begin(found, token_ids, -1)
        transfer = self._store.begin_load(found, kv)
        kv.ticket = transfer.ticket
        self._changes.transfers.append(transfer)
        return kv

    def place(self, kv: SequenceKV, slot: int, num_tokens: int) -> bool:
        """After a load has ended: give the sequence a slot, and room for positions below `num_tokens`. False: no room now."""
        self._check_live(kv)
        if kv.slot >= 0:
            raise IntegrityError(f"a sequence in slot {kv.slot} is placed in slot {slot}")
        if not self._has_room(kv, num_tokens):
            return False
        kv.slot = slot
        for group in self._groups:
            self._write_table(group, kv)
        self._make_room(kv, num_tokens)
        return True

    def reserve(self, kv: SequenceKV, num_tokens: int) -> bool:
        """Make positions below `num_tokens` writable; only needed when that exceeds `kv.capacity_tokens`. False: no room now.

        Copies a tail that others read, and lets go of blocks that left a sliding window (the latter even if False).
        """
        if num_tokens <= kv.capacity_tokens:
            return True
        self._check_live(kv)
        for group in self._groups:
            group.let_pass(kv, self._changes)
        if not self._has_room(kv, num_tokens):
            return False
        self._make_room(kv, num_tokens)
        return True

    def commit(self, kv: SequenceKV, token_ids: Sequence[int], num_computed: int) -> None:
        """The first `num_computed` of these tokens have their KV: publish blocks that are full now, and snapshots.

        A recurrent group's snapshot is taken only where `num_computed` is itself a multiple of block_size.
        """
        kv._num_computed = num_computed
        end = num_computed // self.block_size
        if end <= kv._num_committed:
            return
        self._check_live(kv)
        # Between fork or rewind and the next reserve the capacity is lowered; only then the tables must be asked.
        if num_computed > kv.capacity_tokens or len(token_ids) < end * self.block_size:
            room = min(group.capacity_tokens(kv) for group in self._groups)
            if num_computed > room or len(token_ids) < end * self.block_size:
                raise IntegrityError(
                    f"commit of {num_computed} computed tokens, but {len(token_ids)} are known and blocks hold {room}"
                )
        if kv._is_publishing:
            self._publish(kv, token_ids, end)
        kv._num_committed = end
        kv.next_commit_tokens = (end + 1) * self.block_size

    def fork(self, kv: SequenceKV, slot: int) -> SequenceKV:
        """A second sequence with the same past, in another slot, sharing every block.

        Call it after the forward that computed the shared past, or in its plan: then the source writes the shared tail in that
        forward for both, and neither may `reserve` before a later plan.
        """
        self._check_live(kv)
        copy = SequenceKV(
            slot=slot,
            next_commit_tokens=kv.next_commit_tokens,
            num_ready_tokens=kv.num_ready_tokens,
            _tables=[[] for _ in self._groups],
            _holes=[0] * len(self._groups),
            _path=kv._path.copy(),
            _suffix=kv._suffix,
            _num_committed=kv._num_committed,
            _num_computed=kv._num_computed,
            _is_publishing=kv._is_publishing,
        )
        if copy._path:
            self._tree.pin(copy._path[-1])
        for group in self._groups:
            group.share(kv, copy)
            self._write_table(group, copy)
        self._lower_capacity(kv)
        self._lower_capacity(copy)
        self._live.add(copy)
        return copy

    def rewind(self, kv: SequenceKV, num_tokens: int) -> bool:
        """Forget positions at and after `num_tokens`. False, and nothing changed, if a group cannot go back there.

        A sliding window cannot once blocks that it would see have left; a recurrent state only returns to 0 or to a boundary
        whose snapshot is still there. Blocks already published stay published: they hold what their tokens say.
        """
        self._check_live(kv)
        if not all(group.can_rewind(kv, num_tokens) for group in self._groups):
            return False
        for group in self._groups:
            group.rewind(kv, num_tokens, self._changes)
        end = num_tokens // self.block_size
        if end < len(kv._path):
            tail = kv._path[-1]
            del kv._path[end:]
            if kv._path:
                self._tree.pin(kv._path[-1])
            self._tree.unpin(tail)
        kv._num_committed = min(kv._num_committed, end)
        kv._num_computed = min(kv._num_computed, num_tokens)
        kv.next_commit_tokens = (kv._num_committed + 1) * self.block_size
        self._lower_capacity(kv)
        return True

    def release(self, kv: SequenceKV, *, save: bool = True) -> None:
        """The sequence is gone or preempted. Its published blocks stay in the cache; a store is given those that it wants.

        Blocks on their way to the store are held, not available, until `finish_transfer`; save=False gives the store none,
        and makes all of them available now. A load in flight goes on to its end, and its blocks are published then.
        """
        if kv not in self._live:
            raise IntegrityError(f"a sequence (slot {kv.slot}) is released that is not known, or was released before")
        if self._store is not None:
            self._store.abandon(kv)
            transfer = self._store.begin_save(kv) if save else None
            if transfer is not None:
                self._changes.transfers.append(transfer)
        self._end(kv)

    def take_changes(self) -> KVChanges:
        """Everything since the last call, for the next plan. The caller owns it."""
        changes, self._changes = self._changes, KVChanges()
        return changes

    def finish_transfer(self, ticket: int, has_succeeded: bool) -> None:
        """The worker reported the end of a transfer: leases end.

        A load's blocks are published and its sequence is ready up to them; if it failed, or the cache was reset meanwhile,
        the sequence has its device hit only.
        """
        if self._store is None:
            raise IntegrityError(f"transfer {ticket} ended but there is no store")
        self._store.finish(ticket, has_succeeded)

    def reset_prefix_cache(self) -> int:
        """Forget every prefix, and publish nothing of what runs now. Returns how many blocks were known."""
        if self._store is not None:
            self._store.forget_nodes()
        for kv in self._live:
            kv._path = []
            kv._is_publishing = False
        self._tree.clear()
        return sum(group.pool.forget_owners() for group in self._groups)

    def check_integrity(self) -> None:
        """Compare every count with what tables, tree and transfers account for; O(everything). Raises IntegrityError."""
        self._tree.check_integrity()
        pins: dict[int, int] = {}
        tails = [kv._path[-1] for kv in self._live if kv._path]
        for node in tails + (self._store.pins() if self._store is not None else []):
            pins[id(node)] = pins.get(id(node), 0) + 1
        for node in self._tree.nodes.values():
            if node.num_pins != pins.get(id(node), 0):
                raise IntegrityError(
                    f"{node} is pinned {node.num_pins} times, sequences and loads give {pins.get(id(node), 0)}"
                )
        for group in self._groups:
            self._check_group(group)

    def usage(self) -> tuple[int, int]:
        """Blocks that sequences or transfers hold, and all blocks, over all groups; O(groups), for every step's record."""
        num_used = sum(group.pool.num_blocks - group.pool.num_available for group in self._groups)
        return num_used, sum(self.geometry.num_blocks)

    def stats(self) -> KVStats:
        """Counts now, and totals since the start."""
        pools = [group.pool for group in self._groups]
        store = self._store
        return KVStats(
            free_blocks=sum(pool.num_free for pool in pools),
            cached_blocks=sum(pool.num_cached for pool in pools),
            used_blocks=sum(pool.num_used for pool in pools),
            held_blocks=sum(pool.num_held for pool in pools),
            total_blocks=sum(pool.num_blocks for pool in pools),
            query_tokens=self._num_query_tokens,
            hit_tokens=self._num_hit_tokens,
            store_tokens=store.num_tokens if store is not None else 0,
            evicted_blocks=sum(pool.num_evicted for pool in pools),
            cow_copies=sum(group.num_cow_copies for group in self._groups),
            snapshots=sum(group.num_snapshots for group in self._groups if isinstance(group, RecurrentGroup)),
            store_loads=store.num_loads if store is not None else 0,
            store_saves=store.num_saves if store is not None else 0,
            store_failures=store.num_failures if store is not None else 0,
        )

    def _group_capacity(self, group: KVGroup, max_chunk_tokens: int | None) -> int:
        num_blocks, size = group.pool.num_blocks, self.block_size
        if group.spec.kind == "recurrent":
            return UNBOUNDED_TOKENS
        if group.spec.kind == "sliding_window" and group.spec.window and max_chunk_tokens:
            # Before a chunk, blocks go that left the window at the last commit, up to a block before the chunk's start.
            span = group.spec.window - 1 + size - 1 + max_chunk_tokens
            if num_blocks >= -(-span // size) + 1:
                return UNBOUNDED_TOKENS
        return num_blocks * size

    def _longest_hit(self, path: Sequence[Node]) -> int:
        """The longest prefix, in blocks, from which every group can continue."""
        limit, before = len(path), -1
        has = [[node.blocks[group.index] is not None for node in path] for group in self._groups]
        while limit != before:
            before = limit
            for group in self._groups:
                limit = group.longest_hit(has[group.index], limit)
        return limit

    def _fits(self, found: Lookup, num_tokens: int) -> bool:
        """Is there room for a sequence that takes this device hit and then writes positions below `num_tokens`?"""
        hit, tail = found.num_cached_tokens // self.block_size, found._tail
        if tail is None:
            return all(group.fits(found._path, hit, num_tokens) for group in self._groups)
        path = [*found._path[:hit], tail]
        for group in self._groups:
            must_copy = not group.pool.is_evictable(block_at(tail, group.index))  # else it may be taken from the tree
            if not group.fits(path, hit + 1, num_tokens + must_copy * self.block_size):
                return False
        return True

    def _begin(self, found: Lookup, token_ids: Sequence[int], slot: int) -> SequenceKV:
        """A live sequence that holds the device hit of a lookup."""
        hit = found.num_cached_tokens // self.block_size
        kv = SequenceKV(
            slot=slot,
            next_commit_tokens=(hit + 1) * self.block_size,
            num_ready_tokens=found.num_cached_tokens,
            _tables=[[] for _ in self._groups],
            _holes=[0] * len(self._groups),
            _path=found._path[:hit],
            _suffix=found._suffix,
            _num_committed=hit,
            _num_computed=found.num_cached_tokens,
            _is_publishing=self.enable_prefix_cache,
        )
        taken = kv._path if found._tail is None else [*kv._path, found._tail]
        for group in self._groups:
            group.take(kv, taken, len(taken))
        if kv._path:
            self._tree.pin(kv._path[-1])
        self._live.add(kv)
        self._num_query_tokens += len(token_ids)
        self._num_hit_tokens += found.num_cached_tokens
        return kv

    def _end(self, kv: SequenceKV) -> None:
        for group in self._groups:
            group.release(kv)
        if kv._path:
            self._tree.unpin(kv._path[-1])
        self._live.remove(kv)
        kv._path = []
        kv.slot, kv.capacity_tokens, kv.ticket = -1, 0, None

    def _has_room(self, kv: SequenceKV, num_tokens: int) -> bool:
        for group in self._groups:
            if group.num_missing(kv, num_tokens) > group.pool.num_available:
                return False
        return True

    def _make_room(self, kv: SequenceKV, num_tokens: int) -> None:
        capacity = UNBOUNDED_TOKENS
        for group in self._groups:
            group.make_room(kv, num_tokens, self._changes)
            capacity = min(capacity, group.capacity_tokens(kv))
        kv._may_share_tail = False
        kv.capacity_tokens = capacity

    def _lower_capacity(self, kv: SequenceKV) -> None:
        """The tail may be read by others: make the next write ask."""
        kv._may_share_tail = True
        kv.capacity_tokens = kv._num_committed * self.block_size

    def _publish(self, kv: SequenceKV, token_ids: Sequence[int], end: int) -> None:
        size, tree, path = self.block_size, self._tree, kv._path
        node = path[-1] if path else tree.root
        for i in range(kv._num_committed, end):
            key = self._keys.key(node.key, token_ids[i * size : (i + 1) * size], kv._suffix)
            parent, node = node, tree.extend(node, key)
            tree.pin(node)
            if path:
                tree.unpin(parent)
            path.append(node)
            for group in self._groups:
                group.publish(kv, node, kv._num_computed, self._changes)

    def _write_table(self, group: KVGroup, kv: SequenceKV) -> None:
        table = kv._tables[group.index]
        if table:
            self._changes.table_writes.append((group.index, kv.slot, 0, table.copy()))

    def _check_fresh(self, found: Lookup) -> None:
        if found._generation != self._tree.generation:
            raise IntegrityError("a lookup is used after blocks were evicted; look up again before admit or load")

    def _check_live(self, kv: SequenceKV) -> None:
        if kv not in self._live or kv.ticket is not None:
            raise IntegrityError(
                f"a sequence (slot {kv.slot}, load ticket {kv.ticket}) is used while it is released or loading"
            )

    def _check_group(self, group: KVGroup) -> None:
        refs, leases = self._store.counts(group) if self._store is not None else ({}, {})
        for kv in self._live:
            table, holes = kv._tables[group.index], kv._holes[group.index]
            for i, block in enumerate(table):
                if (block < 0) != (i < holes):
                    raise IntegrityError(
                        f"group {group.spec.name!r}: entry {i} of a table with {holes} holes is block {block}"
                    )
                if block >= 0:
                    refs[block] = refs.get(block, 0) + 1
        group.pool.check_integrity(refs, leases)
        owned = {block: node for block, node in enumerate(group.pool.owners) if node is not None}
        named = {
            node.blocks[group.index]: node for node in self._tree.nodes.values() if node.blocks[group.index] is not None
        }
        if owned != named:
            raise IntegrityError(
                f"group {group.spec.name!r}: pool knows owners of {len(owned)} blocks, tree names {len(named)}"
            )
