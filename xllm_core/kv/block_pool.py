"""The blocks of one KV group: who holds which, and which may be taken next.

A block is in exactly one state, and the four counts always add up to the pool:

    free    nobody holds it and nobody can find it
    cached  nobody holds it, but the prefix tree can find it (it has an owner); kept in LRU order, taken when `free` is empty
    used    one or more sequences hold it (reference count)
    held    no sequence holds it, but a transfer does (lease); becomes cached or free when the transfer ends

A used block may be leased and owned too: a lease forbids writing, an owner forbids changing what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from xllm_core.errors import IntegrityError

Owner = TypeVar("Owner")


class BlockPool(Generic[Owner]):
    """Reference counts, leases, owners, free list and LRU of one group. Every call is O(1) but the checks.

    on_evict(owner): called when a cached block is taken from its owner, before the block is handed out.
    """

    __slots__ = (
        "_free", "_next", "_on_evict", "_prev", "leases", "num_blocks", "num_cached", "num_evicted", "num_held", "owners", "refs",
    )  # fmt: skip

    def __init__(self, num_blocks: int, on_evict: Callable[[Owner], None]) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least 1 block, got {num_blocks}; raise [kv] memory_bytes")
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.leases = [0] * num_blocks
        self.owners: list[Owner | None] = [None] * num_blocks
        self.num_cached = 0
        self.num_held = 0
        self.num_evicted = 0
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end: block 0 first
        # LRU as a ring through the sentinel `num_blocks`: its next is the least recently used. -1: not in the ring.
        self._next = [-1] * num_blocks + [num_blocks]
        self._prev = [-1] * num_blocks + [num_blocks]
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and nobody can find."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """How many times `allocate` can be called now."""
        return len(self._free) + self.num_cached

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._free) - self.num_cached - self.num_held

    def allocate(self) -> int:
        """A block with one reference: a free one, else the least recently used cached one. The caller has seen `num_available`."""
        block = self._free.pop() if self._free else self._evict()
        self.refs[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a used, cached or held block."""
        if self.refs[block] == 0:
            self._leave(block)
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """Take a reference away; the last one makes the block held, cached (most recently used) or free."""
        if self.refs[block] < 1:
            raise IntegrityError(f"block {block} is dropped but has {self.refs[block]} references")
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self._settle(block)

    def publish(self, block: int, owner: Owner) -> None:
        """Give a used block an owner that can find it from now on; its content must not change any more."""
        if self.owners[block] is not None or self.refs[block] < 1:
            raise IntegrityError(
                f"block {block} is published with {self.refs[block]} references and owner {self.owners[block]}"
            )
        self.owners[block] = owner

    def withdraw(self, block: int) -> None:
        """Take a used block's owner away, so that it may be written again. The owner is not told."""
        if self.owners[block] is None or self.refs[block] < 1:
            raise IntegrityError(
                f"block {block} is withdrawn with {self.refs[block]} references and owner {self.owners[block]}"
            )
        self.owners[block] = None

    def lease(self, block: int) -> None:
        """A transfer begins to read or write this used, cached or held block."""
        if self.refs[block] == 0:
            self._leave(block)
            self.num_held += 1
        self.leases[block] += 1

    def unlease(self, block: int) -> None:
        """A transfer of this block ended."""
        if self.leases[block] < 1:
            raise IntegrityError(f"a lease of block {block} ends but it has {self.leases[block]}")
        idle = self.refs[block] == 0
        if idle:
            self.num_held -= 1
        self.leases[block] -= 1
        if idle:
            self._settle(block)

    def touch(self, block: int) -> None:
        """Make a cached block the most recently used; does nothing to used and held ones."""
        if self.refs[block] == 0 and self.leases[block] == 0:
            self._unlink(block)
            self._link(block)

    def is_shared(self, block: int) -> bool:
        """Somebody else reads this block, which one sequence holds: another sequence, or a transfer."""
        return self.refs[block] > 1 or self.leases[block] > 0

    def is_evictable(self, block: int) -> bool:
        """No sequence and no transfer holds it."""
        return self.refs[block] == 0 and self.leases[block] == 0

    def forget_owners(self) -> int:
        """Take every block's owner away; cached blocks become free. The owners are not told. Returns how many had one."""
        num_owned = sum(owner is not None for owner in self.owners)
        sentinel = self.num_blocks
        while (block := self._next[sentinel]) != sentinel:
            self._unlink(block)
            self._free.append(block)
        self.owners = [None] * self.num_blocks
        return num_owned

    def lru(self) -> list[int]:
        """Cached blocks, the next to be evicted first; O(cached), for checks and tests."""
        order: list[int] = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks and len(order) <= self.num_blocks:
            order.append(block)
            block = self._next[block]
        return order

    def check_integrity(self, refs: Mapping[int, int], leases: Mapping[int, int]) -> None:
        """Compare with the references and leases that the caller can account for (absent: 0). Raises IntegrityError."""
        for block in range(self.num_blocks):
            if self.refs[block] != refs.get(block, 0) or self.leases[block] != leases.get(block, 0):
                raise IntegrityError(
                    f"block {block}: pool counts {self.refs[block]} references and {self.leases[block]} leases, "
                    f"tables and transfers give {refs.get(block, 0)} and {leases.get(block, 0)}"
                )
        idle = [block for block in range(self.num_blocks) if self.refs[block] == 0]
        cached = {b for b in idle if self.leases[b] == 0 and self.owners[b] is not None}
        free = {b for b in idle if self.leases[b] == 0 and self.owners[b] is None}
        num_held = len(idle) - len(cached) - len(free)
        lru = self.lru()
        if len(lru) != len(cached) or set(lru) != cached or self.num_cached != len(cached):
            raise IntegrityError(f"LRU lists {len(lru)} blocks, count says {self.num_cached}, owners say {len(cached)}")
        if len(self._free) != len(free) or set(self._free) != free:
            raise IntegrityError(f"free list has {len(self._free)} blocks, {len(free)} are held by nobody")
        total = self.num_free + self.num_cached + self.num_used + self.num_held
        if self.num_held != num_held or total != self.num_blocks:
            raise IntegrityError(
                f"free {self.num_free} + cached {self.num_cached} + used {self.num_used} + held {self.num_held} "
                f"(counted: {num_held}) = {total}, pool has {self.num_blocks}"
            )

    def _evict(self) -> int:
        block = self._next[self.num_blocks]
        owner = None if block == self.num_blocks else self.owners[block]
        if owner is None:
            raise IntegrityError(f"no block to allocate: 0 free, {self.num_cached} cached of {self.num_blocks}")
        self._unlink(block)
        self.owners[block] = None
        self.num_evicted += 1
        self._on_evict(owner)
        return block

    def _settle(self, block: int) -> None:
        """An unreferenced block finds its place."""
        if self.leases[block]:
            self.num_held += 1
        elif self.owners[block] is not None:
            self._link(block)
        else:
            self._free.append(block)

    def _leave(self, block: int) -> None:
        """An unreferenced block leaves its place."""
        if self.leases[block]:
            self.num_held -= 1
        elif self.owners[block] is not None:
            self._unlink(block)
        else:
            raise IntegrityError(f"block {block} is free and cannot be referenced; only `allocate` hands it out")

    def _link(self, block: int) -> None:
        sentinel = self.num_blocks
        last = self._prev[sentinel]
        self._next[last] = self._prev[sentinel] = block
        self._prev[block], self._next[block] = last, sentinel
        self.num_cached += 1

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self._next[block] = self._prev[block] = -1
        self.num_cached -= 1
