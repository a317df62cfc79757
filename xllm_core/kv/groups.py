"""What differs between kinds of KV groups: which blocks a position needs, what a hit takes, how far one can go back.

    full            every block of the sequence, for ever
    sliding_window  the query at position p sees p - window + 1 .. p, so blocks wholly before that are let go (holes, -1)
    recurrent       one working block that each forward overwrites; copies of it at block boundaries ("snapshots") are what
                    the prefix tree holds. A new working block holds anything: a forward that starts at position 0 starts
                    from the empty state and must not read it.

Blocks that the tree holds, that two sequences share or that a transfer reads are never written: whoever wants to write copies
first (copy on write), and the copy is queued before the forward that writes. Nothing here can fail half-way: `fits` and
`num_missing` are asked of all groups first, and what follows has its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xllm_core.errors import IntegrityError
from xllm_core.kv.block_pool import BlockPool
from xllm_core.kv.prefix_tree import Node, PrefixTree
from xllm_core.kv.sequence import SequenceKV
from xllm_core.plugins.contracts.kv import KVGroupSpec
from xllm_core.types import KVChanges

UNBOUNDED_TOKENS = 1 << 62


class KVGroup(Protocol):
    """One group's share of the manager's work. `path[i]` is the node of block i; lengths of hits are in blocks of tokens."""

    index: int
    spec: KVGroupSpec
    pool: BlockPool[Node]
    num_cow_copies: int

    def needed(self, num_blocks: int) -> range:
        """Which blocks of a prefix a sequence must have to continue after it."""

    def longest_hit(self, has: Sequence[bool], limit: int) -> int:
        """The longest prefix, at most `limit` blocks, that this group can continue from, where `has[i]` says block i is there."""

    def fits(self, path: Sequence[Node], hit: int, num_tokens: int) -> bool:
        """Is there room for a new sequence that takes this hit and then writes positions below `num_tokens`?"""

    def take(self, kv: SequenceKV, path: Sequence[Node], hit: int) -> None:
        """Reference the blocks of a hit, as the sequence's table."""

    def num_missing(self, kv: SequenceKV, num_tokens: int) -> int:
        """Fresh blocks that `make_room` would need."""

    def make_room(self, kv: SequenceKV, num_tokens: int, changes: KVChanges) -> None:
        """Make positions below `num_tokens` writable: append blocks, copy what others read."""

    def capacity_tokens(self, kv: SequenceKV) -> int:
        """Positions that the table covers."""

    def let_pass(self, kv: SequenceKV, changes: KVChanges) -> None:
        """Let go of blocks that no later position needs."""

    def publish(self, kv: SequenceKV, node: Node, num_computed: int, changes: KVChanges) -> None:
        """Block `node.depth - 1` is full and computed: let the tree find it, if the tree has no such block yet."""

    def share(self, kv: SequenceKV, copy: SequenceKV) -> None:
        """Give a fork references to all blocks."""

    def can_rewind(self, kv: SequenceKV, num_tokens: int) -> bool:
        """Could the sequence go on from `num_tokens`?"""

    def rewind(self, kv: SequenceKV, num_tokens: int, changes: KVChanges) -> None:
        """Forget positions at and after `num_tokens`; `can_rewind` said yes."""

    def release(self, kv: SequenceKV) -> None:
        """Drop every reference, last block first, so that heads outlive tails in the LRU."""


class PagedGroup:
    """Full attention and sliding windows: one block per `block_size` tokens."""

    def __init__(self, index: int, spec: KVGroupSpec, num_blocks: int, block_size: int, tree: PrefixTree) -> None:
        self.index = index
        self.spec = spec
        self.window = spec.window if spec.kind == "sliding_window" else None
        self.pool: BlockPool[Node] = BlockPool(num_blocks, lambda node: tree.detach(node, index))
        self.num_cow_copies = 0
        self._tree = tree
        self._block_size = block_size

    def _first_needed(self, num_tokens: int) -> int:
        """Index of the first block that the query at position `num_tokens`, or any later one, can see."""
        return 0 if self.window is None else max(0, num_tokens - self.window + 1) // self._block_size

    def needed(self, num_blocks: int) -> range:
        return range(self._first_needed(num_blocks * self._block_size), num_blocks)

    def longest_hit(self, has: Sequence[bool], limit: int) -> int:
        while limit > 0:
            gap = next((i for i in reversed(self.needed(limit)) if not has[i]), -1)
            if gap < 0:
                break
            limit = gap  # any longer prefix would still have the gap inside what it needs
        return limit

    def fits(self, path: Sequence[Node], hit: int, num_tokens: int) -> bool:
        # Taking the hit pins cached blocks, which then cannot be evicted to make the rest.
        num_pinned = sum(self.pool.is_evictable(self._block_at(path[i])) for i in self.needed(hit))
        return self.pool.num_available - num_pinned >= -(-num_tokens // self._block_size) - hit

    def take(self, kv: SequenceKV, path: Sequence[Node], hit: int) -> None:
        needed = self.needed(hit)
        blocks = [self._block_at(path[i]) for i in needed]
        for block in blocks:
            self.pool.acquire(block)
        kv._tables[self.index] = [-1] * needed.start + blocks
        kv._holes[self.index] = needed.start

    def num_missing(self, kv: SequenceKV, num_tokens: int) -> int:
        table = kv._tables[self.index]
        num_missing = max(0, -(-num_tokens // self._block_size) - len(table))
        if kv._may_share_tail:
            num_missing += sum(self.pool.is_shared(block) for block in table[kv._num_committed :])
        return num_missing

    def make_room(self, kv: SequenceKV, num_tokens: int, changes: KVChanges) -> None:
        table = kv._tables[self.index]
        first = len(table)
        num_new = -(-num_tokens // self._block_size) - first
        if num_new > 0:
            new = [self.pool.allocate() for _ in range(num_new)]
            table.extend(new)
            if kv.slot >= 0:
                changes.table_writes.append((self.index, kv.slot, first, new))
        if kv._may_share_tail:
            # What others read must be copied and was counted; what only the tree holds takes what room is left.
            for i in sorted(range(kv._num_committed, first), key=lambda i: not self.pool.is_shared(table[i])):
                own_block(self, self._tree, kv, i, changes)

    def capacity_tokens(self, kv: SequenceKV) -> int:
        return len(kv._tables[self.index]) * self._block_size

    def let_pass(self, kv: SequenceKV, changes: KVChanges) -> None:
        if self.window is None:
            return
        holes, first = kv._holes[self.index], self._first_needed(kv._num_computed)
        if first <= holes:
            return
        table = kv._tables[self.index]
        for i in range(first - 1, holes - 1, -1):
            self._let_go(kv, i)
            table[i] = -1
        kv._holes[self.index] = first
        if kv.slot >= 0:
            changes.table_writes.append((self.index, kv.slot, holes, [-1] * (first - holes)))

    def publish(self, kv: SequenceKV, node: Node, num_computed: int, changes: KVChanges) -> None:
        block = kv._tables[self.index][node.depth - 1]
        if node.blocks[self.index] is None and block >= 0:
            self._tree.attach(node, self.index, block)
            self.pool.publish(block, node)

    def share(self, kv: SequenceKV, copy: SequenceKV) -> None:
        table, holes = kv._tables[self.index], kv._holes[self.index]
        for block in table[holes:]:
            self.pool.acquire(block)
        copy._tables[self.index] = table.copy()
        copy._holes[self.index] = holes

    def can_rewind(self, kv: SequenceKV, num_tokens: int) -> bool:
        return num_tokens == 0 or kv._holes[self.index] <= self._first_needed(num_tokens)

    def rewind(self, kv: SequenceKV, num_tokens: int, changes: KVChanges) -> None:
        table = kv._tables[self.index]
        keep = -(-num_tokens // self._block_size)
        for i in range(len(table) - 1, max(keep, kv._holes[self.index]) - 1, -1):
            self._let_go(kv, i)
        del table[keep:]
        kv._holes[self.index] = min(kv._holes[self.index], keep)

    def release(self, kv: SequenceKV) -> None:
        for i in range(len(kv._tables[self.index]) - 1, kv._holes[self.index] - 1, -1):
            self._let_go(kv, i)
        kv._tables[self.index] = []

    def _let_go(self, kv: SequenceKV, i: int) -> None:
        """Drop block i. Where the tree meanwhile holds another block of the same tokens, that one counts as just used.

        Where the tree lost its block and the sequence has one of its own, the own one takes the place.
        """
        block = kv._tables[self.index][i]
        if i < len(kv._path):
            node = kv._path[i]
            held = node.blocks[self.index]
            if held is None:
                self._tree.attach(node, self.index, block)
                self.pool.publish(block, node)
            elif held != block:
                self.pool.touch(held)
        self.pool.drop(block)

    def _block_at(self, node: Node) -> int:
        return block_at(node, self.index)


class RecurrentGroup:
    """States that each token overwrites: one working block per sequence, snapshots at block boundaries."""

    def __init__(self, index: int, spec: KVGroupSpec, num_blocks: int, block_size: int, tree: PrefixTree) -> None:
        self.index = index
        self.spec = spec
        self.pool: BlockPool[Node] = BlockPool(num_blocks, lambda node: tree.detach(node, index))
        self.num_cow_copies = 0
        self.num_snapshots = 0
        self._tree = tree
        self._block_size = block_size

    def needed(self, num_blocks: int) -> range:
        return range(max(0, num_blocks - 1), num_blocks)

    def longest_hit(self, has: Sequence[bool], limit: int) -> int:
        return next((i for i in range(limit, 0, -1) if has[i - 1]), 0)

    def fits(self, path: Sequence[Node], hit: int, num_tokens: int) -> bool:
        # An idle snapshot can itself become the working block when there is no other.
        is_idle = hit > 0 and self.pool.is_evictable(block_at(path[hit - 1], self.index))
        return is_idle or self.pool.num_available > 0

    def take(self, kv: SequenceKV, path: Sequence[Node], hit: int) -> None:
        # The snapshot stands in the table as a shared tail; make_room copies it into a working block.
        table = [block_at(path[hit - 1], self.index)] if hit else []
        for block in table:
            self.pool.acquire(block)
        kv._tables[self.index] = table

    def num_missing(self, kv: SequenceKV, num_tokens: int) -> int:
        table = kv._tables[self.index]
        return 1 if not table else int(kv._may_share_tail and self.pool.is_shared(table[0]))

    def make_room(self, kv: SequenceKV, num_tokens: int, changes: KVChanges) -> None:
        table = kv._tables[self.index]
        if not table:
            table.append(self.pool.allocate())
            if kv.slot >= 0:
                changes.table_writes.append((self.index, kv.slot, 0, table.copy()))
        elif kv._may_share_tail:
            own_block(self, self._tree, kv, 0, changes)

    def capacity_tokens(self, kv: SequenceKV) -> int:
        return UNBOUNDED_TOKENS

    def let_pass(self, kv: SequenceKV, changes: KVChanges) -> None:
        pass

    def publish(self, kv: SequenceKV, node: Node, num_computed: int, changes: KVChanges) -> None:
        """Keep a snapshot, if the state stands exactly after this node and a block is free or evictable for it.

        The copy reads the working block before the next forward overwrites it: it is applied first in the next plan.
        """
        if num_computed != node.depth * self._block_size or node.blocks[self.index] is not None:
            return
        if not self.pool.num_available:
            return
        snapshot = self.pool.allocate()
        changes.copies.append((self.index, kv._tables[self.index][0], snapshot))
        self._tree.attach(node, self.index, snapshot)
        self.pool.publish(snapshot, node)
        self.pool.drop(snapshot)
        self.num_snapshots += 1

    def share(self, kv: SequenceKV, copy: SequenceKV) -> None:
        copy._tables[self.index] = kv._tables[self.index].copy()
        for block in copy._tables[self.index]:
            self.pool.acquire(block)

    def can_rewind(self, kv: SequenceKV, num_tokens: int) -> bool:
        depth, rest = divmod(num_tokens, self._block_size)
        if depth == 0 or rest or depth > len(kv._path):
            return num_tokens == 0
        return kv._path[depth - 1].blocks[self.index] is not None

    def rewind(self, kv: SequenceKV, num_tokens: int, changes: KVChanges) -> None:
        old = kv._tables[self.index]
        self.take(kv, kv._path, num_tokens // self._block_size)
        for block in old:
            self.pool.drop(block)
        table = kv._tables[self.index]
        if table and kv.slot >= 0:
            changes.table_writes.append((self.index, kv.slot, 0, table.copy()))

    def release(self, kv: SequenceKV) -> None:
        for block in kv._tables[self.index]:
            self.pool.drop(block)
        kv._tables[self.index] = []


def own_block(group: KVGroup, tree: PrefixTree, kv: SequenceKV, i: int, changes: KVChanges) -> None:
    """Make entry i of a table writable: copy it if others read it; if only the tree does, copy it where there is room.

    The last resort for a published block is to take it out of the tree: that needs no room, and nobody else reads it.
    """
    pool, table = group.pool, kv._tables[group.index]
    block = table[i]
    owner = pool.owners[block]
    if not pool.is_shared(block):
        if owner is None:
            return
        if not pool.num_available:
            pool.withdraw(block)
            tree.detach(owner, group.index)
            return
    new = pool.allocate()
    changes.copies.append((group.index, block, new))
    table[i] = new
    if kv.slot >= 0:
        changes.table_writes.append((group.index, kv.slot, i, [new]))
    pool.drop(block)
    group.num_cow_copies += 1


def block_at(node: Node, group: int) -> int:
    """The block of a group at a node that must have one."""
    block = node.blocks[group]
    if block is None:
        raise IntegrityError(f"{node} has no block of group {group}; what was looked up is gone")
    return block


def build_group(index: int, spec: KVGroupSpec, num_blocks: int, block_size: int, tree: PrefixTree) -> KVGroup:
    """The group for a declaration. Raises ValueError for a kind that this cache does not know, or a window below 1."""
    if spec.kind == "full":
        return PagedGroup(index, spec, num_blocks, block_size, tree)
    if spec.kind == "sliding_window":
        if spec.window is None or spec.window < 1:
            raise ValueError(
                f"KV group {spec.name!r}: kind 'sliding_window' needs window >= 1 tokens, got {spec.window}"
            )
        return PagedGroup(index, spec, num_blocks, block_size, tree)
    if spec.kind == "recurrent":
        return RecurrentGroup(index, spec, num_blocks, block_size, tree)
    raise ValueError(
        f"KV group {spec.name!r}: kind {spec.kind!r} is unknown; use 'full', 'sliding_window' or 'recurrent'"
    )
