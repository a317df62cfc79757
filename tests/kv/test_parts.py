"""Keys, pool, tree and groups, each against its definition written a second, slower way."""

from __future__ import annotations

import struct
from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm_core.errors import IntegrityError
from xllm_core.kv.block_pool import BlockPool
from xllm_core.kv.groups import build_group
from xllm_core.kv.keys import BlockKeys, block_key, storage_key
from xllm_core.kv.manager import KVManager
from xllm_core.kv.prefix_tree import Node, PrefixTree
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec

SETTINGS = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def lp(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def test_block_keys_are_the_documented_bytes() -> None:
    """A router must compute the same key from the description alone. Mutation: any change of order, tag or integer width."""
    tokens = [0, 1, 258, 2**32 - 1]
    packed = b"\0\0\0\0\x01\0\0\0\x02\x01\0\0\xff\xff\xff\xff"
    first = sha256(lp(b"xllm.block.1") + lp(b"") + lp(packed) + lp(b"") + lp(b"") + lp(b"")).digest()
    assert block_key(b"", tokens) == first
    second = sha256(
        lp(b"xllm.block.1") + lp(first) + lp(packed) + lp(b"ad") + lp(b"\x07m") + lp("sé".encode())
    ).digest()
    assert block_key(first, tokens, adapter="ad", media=b"\x07m", salt="sé") == second
    keys = BlockKeys(4)
    assert keys.key(first, tokens, keys.suffix(adapter="ad", media=b"\x07m", salt="sé")) == second
    assert (
        block_key(b"", [1, 2]).hex()
        == sha256(
            bytes.fromhex("0c000000786c6c6d2e626c6f636b2e3100000000080000000100000002000000" + "00000000" * 3)
        ).hexdigest()
    )


def test_different_inputs_never_share_a_key() -> None:
    """Lengths come before contents. Mutation: `_prefixed` without the length lets ("ab", "c") meet ("a", "bc")."""
    names = [
        block_key(b"", [1, 2], adapter="ab", salt="c"), block_key(b"", [1, 2], adapter="a", salt="bc"),
        block_key(b"", [1, 2], salt="abc"), block_key(b"", [1, 2], media=b"abc"), block_key(b"", [1, 2]),
        block_key(b"", [2, 1]), block_key(block_key(b"", [1]), [2]),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    stored = [storage_key(names[0], f, part) for f in ("m1", "m2", "") for part in ("", "window", "m1")]
    assert len(set(stored)) == len(stored)
    expected = sha256(lp(b"xllm.store.1") + lp(names[0]) + lp(b"m1") + lp(b"window")).digest()
    assert storage_key(names[0], "m1", "window") == expected


class NaivePool:
    """The pool's states, by the book: sets and a list."""

    def __init__(self, num_blocks: int) -> None:
        self.refs, self.leases = Counter(), Counter()
        self.owners: dict[int, int] = {}
        self.lru: list[int] = []
        self.evicted: list[int] = []
        self.num_blocks = num_blocks

    def settle(self, block: int) -> None:
        if block in self.lru:
            self.lru.remove(block)
        if not self.refs[block] and not self.leases[block] and block in self.owners:
            self.lru.append(block)


@SETTINGS
@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), max_size=60))
def test_pool_follows_the_naive_model(num_blocks: int, operations: list[tuple[int, int]]) -> None:
    """States, LRU order and the order of evictions agree with a model of sets and lists, after every operation.

    Mutations seen red: `_link` at the head of the ring; `touch` that does nothing; `unlease` that does not settle;
    `_settle` that ignores leases; `_evict` that keeps the owner.
    """
    naive = NaivePool(num_blocks)
    pool: BlockPool[int] = BlockPool(num_blocks, lambda owner: naive.evicted.append(owner))
    serial = 0
    for code, pick in operations:
        block = pick % num_blocks
        used, leased, owned = naive.refs[block] > 0, naive.leases[block] > 0, block in naive.owners
        if code == 0 and pool.num_available:
            victim = naive.lru[0] if naive.lru and not pool.num_free else None
            num_evicted = len(naive.evicted)
            block = pool.allocate()
            if victim is not None:
                assert block == victim and naive.evicted[num_evicted:] == [naive.owners.pop(victim)]
            assert not naive.refs[block] and not naive.leases[block] and block not in naive.owners
            naive.refs[block] = 1
            naive.settle(block)
        elif code == 1 and (used or leased or owned):
            pool.acquire(block)
            naive.refs[block] += 1
            naive.settle(block)
        elif code == 2 and used:
            pool.drop(block)
            naive.refs[block] -= 1
            naive.settle(block)
        elif code == 3 and used and not owned:
            serial += 1
            pool.publish(block, serial)
            naive.owners[block] = serial
        elif code == 4 and used and owned:
            pool.withdraw(block)
            del naive.owners[block]
        elif code == 5 and (used or leased or owned):
            pool.lease(block)
            naive.leases[block] += 1
            naive.settle(block)
        elif code == 6 and leased:
            pool.unlease(block)
            naive.leases[block] -= 1
            naive.settle(block)
        elif code == 7 and owned:
            pool.touch(block)
            naive.settle(block)
        pool.check_integrity(naive.refs, naive.leases)
        assert pool.lru() == naive.lru
        assert {b: o for b, o in enumerate(pool.owners) if o is not None} == naive.owners
        assert pool.is_shared(block) == (naive.refs[block] > 1 or naive.leases[block] > 0)


def test_pool_refuses_what_would_corrupt_it() -> None:
    """Each misuse is an IntegrityError with numbers, not a silent change. Mutation: drop any one check."""
    pool: BlockPool[str] = BlockPool(1, lambda owner: None)
    for misuse in (
        pool.acquire,
        pool.drop,
        pool.unlease,
        pool.lease,
        pool.withdraw,
        lambda block: pool.publish(block, "x"),
    ):
        with pytest.raises(IntegrityError, match="block 0"):
            misuse(0)
    pool.allocate()
    with pytest.raises(IntegrityError, match="0 free, 0 cached of 1"):
        pool.allocate()
    with pytest.raises(ValueError, match="at least 1 block, got 0"):
        BlockPool(0, lambda owner: None)


@pytest.mark.parametrize("field", ["refs", "leases", "num_cached", "num_held", "_free", "owners"])
def test_integrity_check_sees_every_count(field: str) -> None:
    """A check that cannot fail proves nothing: each count is falsified in turn."""
    pool: BlockPool[str] = BlockPool(3, lambda owner: None)
    cached, used = pool.allocate(), pool.allocate()
    pool.publish(cached, "cached")
    pool.drop(cached)
    pool.check_integrity({used: 1}, {})
    value = getattr(pool, field)
    if isinstance(value, int):
        setattr(pool, field, value + 1)
    elif field == "_free":
        value.clear()
    else:
        value[cached] = None if field == "owners" else 1
    with pytest.raises(IntegrityError):
        pool.check_integrity({used: 1}, {})


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=60))
def test_tree_keeps_exactly_what_has_a_reason(operations: list[tuple[int, int]]) -> None:
    """Nodes live while they, or a descendant, hold a block or a pin. Mutations: `_prune` that stops at the first parent, or
    that ignores pins or children."""
    tree = PrefixTree(1)
    reasons: Counter = Counter()
    made = {b"": tree.root}
    for code, pick in operations:
        known = [made[key] for key in sorted(made) if key == b"" or tree.nodes.get(key) is made[key]]
        node = known[pick % len(known)]
        if code == 0:
            key = node.key + bytes([pick % 2])
            child = tree.extend(node, key)
            made[key] = child
            tree.pin(child)
            reasons[key] += 1
        elif code == 1 and node is not tree.root and node.blocks[0] is None:
            tree.attach(node, 0, pick)
            with pytest.raises(IntegrityError):
                tree.attach(node, 0, pick)
        elif code == 2 and node is not tree.root and node.blocks[0] is not None:
            before = tree.generation
            tree.detach(node, 0)
            assert tree.generation > before
        elif code == 3 and reasons[node.key]:
            reasons[node.key] -= 1
            tree.unpin(node)
        tree.check_integrity()
        alive = {key for key, n in tree.nodes.items() if reasons[key] or n.blocks[0] is not None}
        assert set(tree.nodes) == {key[:length] for key in alive for length in range(1, len(key) + 1)}
    keys = [bytes([0] * length) for length in range(1, 6)]
    assert [node.key for node in tree.match(keys)] == [key for key in keys if key in tree.nodes]


@SETTINGS
@given(
    st.sampled_from(["full", "sliding_window", "recurrent"]), st.integers(1, 14), st.lists(st.booleans(), max_size=12)
)
def test_longest_hit_is_the_longest_prefix_with_all_that_it_needs(kind: str, window: int, has: list[bool]) -> None:
    """Against the definition, position by position: the next query, at n, sees n - window + 1 .. n.

    Mutations seen red: window off by one in either direction; `break` after the first gap; recurrent taking any snapshot.
    """
    size = 4
    group = build_group(0, KVGroupSpec("g", kind, (0,), (), window), 8, size, PrefixTree(1))

    def can_continue(num_blocks: int) -> bool:
        n = num_blocks * size
        if kind == "recurrent":
            return n == 0 or has[num_blocks - 1]
        seen = range(max(0, n - window + 1) if kind == "sliding_window" else 0, n)
        return all(has[position // size] for position in seen)

    for limit in range(len(has) + 1):
        assert group.longest_hit(has, limit) == max(n for n in range(limit + 1) if can_continue(n))


@SETTINGS
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=12), st.integers(1, 14))
def test_a_hit_suits_every_group(has: list[tuple[bool, bool, bool]], window: int) -> None:
    """The longest length on which all groups agree; what one shortens, another must be asked again. Mutation: ask each once."""
    kinds = ("full", "sliding_window", "recurrent")
    specs = tuple(KVGroupSpec(kind, kind, (0,), (), window) for kind in kinds)
    manager = KVManager(KVGeometry(specs, 4, (8,) * 3, (8,) * 3, "test", "f"))
    path: list[Node] = []
    for present in has:
        node = Node(b"", path[-1] if path else None, 3)
        node.blocks = [7 if is_here else None for is_here in present]
        path.append(node)

    def suits(num_blocks: int) -> bool:
        n = num_blocks * 4
        seen = {position // 4 for position in range(max(0, n - window + 1), n)}
        return (
            all(full for full, _, _ in has[:num_blocks])
            and all(has[i][1] for i in seen)
            and (n == 0 or has[num_blocks - 1][2])
        )

    assert manager._longest_hit(path) == max(n for n in range(len(has) + 1) if suits(n))
