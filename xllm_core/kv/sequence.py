"""What the KV manager knows of one sequence, of one lookup, and of itself: plain data that the scheduler reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm_core.kv.prefix_tree import Node


@dataclass(slots=True)
class Lookup:
    """What is known of a prompt. Takes no reference: valid until the manager's next change, and checked for that.

    num_cached_tokens: leading tokens found on the device by all groups, less than the prompt: at least one token is computed.
        A multiple of block_size, or all tokens but the last where its block is there too (`_tail`).
    num_store_blocks: further blocks of tokens that a store would bring.
    is_later: the store does not know yet, or the blocks are on their way for another sequence: wait aside, look up again.
    """

    num_cached_tokens: int = 0
    num_store_blocks: int = 0
    is_later: bool = False
    _path: list[Node] = field(default_factory=list)
    _tail: Node | None = None
    _keys: list[bytes] = field(default_factory=list)
    _suffix: bytes = b""
    _generation: int = 0


@dataclass(slots=True, eq=False)
class SequenceKV:
    """The blocks of one sequence. The scheduler reads the fields without underscore; only the manager writes any of them.

    slot: row in the worker's buffers, -1 while it has none. ticket: of a load in flight, else None.
    capacity_tokens: positions below it can be written without asking; `reserve` raises it, `fork` and `rewind` lower it.
    next_commit_tokens: `commit` has something to do once this many tokens are computed.
    num_ready_tokens: leading tokens whose KV was there at the start: the prefix hit, and what a load brought.
    """

    slot: int = -1
    capacity_tokens: int = 0
    next_commit_tokens: int = 0
    num_ready_tokens: int = 0
    ticket: int | None = None
    # tables[g]: block ids of group g, -1 a hole before a sliding window; a recurrent group has one entry, or none yet.
    _tables: list[list[int]] = field(default_factory=list)
    _holes: list[int] = field(default_factory=list)  # leading entries of tables[g] that are -1
    _path: list[Node] = field(default_factory=list)  # nodes of the committed blocks; empty where nothing is published
    _suffix: bytes = b""
    _num_committed: int = 0  # leading blocks that are full, computed, and never written again
    _num_computed: int = 0  # tokens at the last commit: a lower bound of what is computed now
    _is_publishing: bool = (
        True  # False without a prefix cache, and after a reset: what was computed before must not return
    )
    _may_share_tail: bool = True  # a block after the committed ones may be read by others: look before writing


@dataclass(frozen=True, slots=True)
class KVStats:
    """Counts of one manager. Blocks are summed over groups: free + cached + used + held == total.

    query_tokens, hit_tokens: tokens of admitted prompts, and how many of them the device had. store_tokens: brought by loads.
    cow_copies: shared or published tails copied before a write. snapshots: recurrent states kept. store_*: transfers.
    """

    free_blocks: int
    cached_blocks: int
    used_blocks: int
    held_blocks: int
    total_blocks: int
    query_tokens: int
    hit_tokens: int
    store_tokens: int
    evicted_blocks: int
    cow_copies: int
    snapshots: int
    store_loads: int
    store_saves: int
    store_failures: int
