"""The host store by itself and under the manager: bit exact, bounded, honest about what is on the way, robust to the end."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from xllm_core.errors import ConfigError
from xllm_core.kv.host_store import HostStore
from xllm_core.plugins.contracts.kv import Hit, Later, Miss
from xllm_core.types import KVTransfer


class Bytes:
    """A device cache of random bytes. gate: copies wait for it; broken: blocks whose copy raises."""

    def __init__(self, geometry) -> None:
        generator = np.random.default_rng(3)
        self.blocks = [
            generator.integers(0, 256, (count, size), dtype=np.uint8)
            for count, size in zip(geometry.num_blocks, geometry.block_bytes, strict=True)
        ]
        self.gate = threading.Event()
        self.gate.set()
        self.broken: set[int] = set()

    def read_block(self, group: int, block_id: int) -> torch.Tensor:
        assert self.gate.wait(10)
        if block_id in self.broken:
            raise RuntimeError(f"block {block_id} cannot be read")
        return torch.from_numpy(self.blocks[group][block_id].copy())

    def write_block(self, group: int, block_id: int, data: torch.Tensor) -> None:
        assert self.gate.wait(10)
        self.blocks[group][block_id] = data.numpy()


def finished(mover, num_tickets: int = 1) -> list[tuple[int, bool]]:
    """Poll until so many tickets ended."""
    ended: list[tuple[int, bool]] = []
    deadline = time.monotonic() + 10
    while len(ended) < num_tickets:
        assert time.monotonic() < deadline, f"only {ended} ended"
        ended += mover.poll()
        time.sleep(0.0005)
    return ended


class Shop:
    """A store with both sides and a device."""

    def __init__(self, geometry, max_bytes: int) -> None:
        self.store = HostStore({"host_store_bytes": max_bytes}, geometry)
        self.device = Bytes(geometry)
        self.index, self.mover = self.store.index(), self.store.mover(self.device)

    def begin(self, ticket: int, keys: list[bytes], blocks: list[list[int]], is_load: bool = False) -> None:
        transfer = KVTransfer(ticket, is_load, keys, blocks)
        self.index.planned(transfer)
        self.mover.start([transfer])

    def move(self, *args, **kwargs) -> bool:
        self.begin(*args, **kwargs)
        [(ticket, has_succeeded)] = finished(self.mover)
        self.index.finished(ticket, has_succeeded)
        return has_succeeded


@pytest.fixture
def shop(geometry_of):
    """shop(kinds, num_blocks, max_bytes): closed at the end."""
    opened: list[Shop] = []

    def build(kinds=("full",), num_blocks=16, max_bytes=1 << 20) -> Shop:
        opened.append(Shop(geometry_of(kinds, num_blocks), max_bytes))
        return opened[-1]

    yield build
    for one in opened:
        one.device.gate.set()
        one.mover.close()


def keys_of(num: int, name: str = "k") -> list[bytes]:
    return [f"{name}{i}".encode() for i in range(num)]


def test_round_trip_is_bit_exact_and_groups_stay_apart(shop) -> None:
    """Bytes come back into other blocks as they were; a group that has none at a key is left alone. Mutation: swap groups."""
    one = shop(("full", "full", "recurrent"))
    keys = keys_of(3)
    before = [array.copy() for array in one.device.blocks]
    assert one.index.lookup(keys) == Miss() and list(one.index.wants(keys)) == [True] * 3
    assert one.move(0, keys, [[0, 1, 2], [5, 6, 7], [-1, -1, 4]])
    assert one.index.lookup(keys) == Hit(3) and list(one.index.wants([*keys, b"x"])) == [False, False, False, True]
    for array in one.device.blocks:
        array[:] = 0
    assert one.move(1, keys, [[8, 9, 10], [1, 2, 3], [-1, -1, 0]], is_load=True)
    for group, (source, target) in enumerate((([0, 1, 2], [8, 9, 10]), ([5, 6, 7], [1, 2, 3]), ([4], [0]))):
        np.testing.assert_array_equal(one.device.blocks[group][target], before[group][source])
        others = [b for b in range(16) if b not in target]
        assert not one.device.blocks[group][others].any(), "a block that was not asked for was written"
    stats = one.store.stats()
    assert (stats["stored_blocks"], stats["loaded_blocks"]) == (3, 3)
    assert stats["used_bytes"] == 3 * 64 + 8


def test_later_while_a_save_is_on_the_way_then_hit(shop) -> None:
    """Not a miss, or a second sequence computes it all again; not a hit, or it reads nothing. `start` and `poll` do not wait."""
    one = shop()
    one.device.gate.clear()
    started = time.monotonic()
    one.begin(0, keys_of(2), [[0, 1]])
    assert one.mover.poll() == [] and time.monotonic() - started < 0.5
    assert one.index.lookup(keys_of(3)) == Later()
    assert list(one.index.wants(keys_of(3))) == [False, False, True], "what is on the way is not wanted again"
    one.device.gate.set()
    assert finished(one.mover) == [(0, True)]
    one.index.finished(0, True)
    assert one.index.lookup(keys_of(3)) == Hit(2)
    assert one.store.stats()["laters"] == 1


def test_bounded_and_tails_leave_before_heads(shop) -> None:
    """Never more bytes than allowed; the least recently used chain shrinks from its end. Mutation: insert heads first."""
    one = shop(max_bytes=32 * 4)
    assert one.move(0, keys_of(3, "a"), [[0, 1, 2]])
    assert one.move(1, keys_of(2, "b"), [[3, 4]])
    assert one.store.stats()["used_bytes"] == 128 and one.store.stats()["evicted_blocks"] == 1
    assert one.index.lookup(keys_of(3, "a")) == Hit(2), "a2 went; a is now the more recent"
    assert one.move(2, keys_of(1, "c"), [[5]])
    assert one.index.lookup(keys_of(2, "b")) == Hit(1) and one.index.lookup(keys_of(3, "a")) == Hit(2)
    many = keys_of(9, "d")
    assert list(one.index.wants(many)) == [True] * 4 + [False] * 5, "more than could ever be kept is not asked for"
    assert one.move(3, many, [list(range(9))])
    assert one.index.lookup(many) == Hit(4) and one.store.stats()["used_bytes"] == 128


def test_what_a_load_reads_is_not_evicted_under_it(shop) -> None:
    """A save planned while a load waits takes no room from it. Mutation: `make_room` without the pin check."""
    one = shop(max_bytes=64)
    assert one.move(0, keys_of(2, "a"), [[0, 1]])
    before = one.device.blocks[0][[0, 1]].copy()
    one.device.gate.clear()
    one.begin(1, keys_of(2, "a"), [[6, 7]], is_load=True)
    one.begin(2, keys_of(2, "b"), [[3, 4]])
    one.device.gate.set()
    ended = finished(one.mover, 2)
    assert ended == [(1, True), (2, True)]
    np.testing.assert_array_equal(one.device.blocks[0][[6, 7]], before)
    for ticket, has_succeeded in ended:
        one.index.finished(ticket, has_succeeded)
    assert one.index.lookup(keys_of(2, "b")) == Miss() and one.store.stats()["used_bytes"] == 64


def test_a_load_of_something_gone_fails_and_writes_nothing(shop) -> None:
    """Mutation: load what is left, and report success."""
    one = shop(max_bytes=64)
    assert one.move(0, keys_of(2, "a"), [[0, 1]])
    assert one.move(1, keys_of(1, "b"), [[3]])
    before = one.device.blocks[0].copy()
    assert not one.move(2, keys_of(2, "a"), [[6, 7]], is_load=True)
    np.testing.assert_array_equal(one.device.blocks[0], before)


def test_a_failed_save_leaves_no_ghost_and_the_thread_lives(shop, caplog) -> None:
    """The key is wanted again, its bytes are given back, the next transfer works. Mutation: let the exception end the thread."""
    one = shop()
    one.device.broken = {1}
    assert not one.move(0, keys_of(2), [[0, 1]])
    assert "save 0 of 2 blocks failed" in caplog.text and "block 1 cannot be read" in caplog.text
    assert one.index.lookup(keys_of(2)) == Hit(1) and list(one.index.wants(keys_of(2))) == [False, True]
    assert one.store.stats()["used_bytes"] == 32
    assert one.move(1, keys_of(2), [[0, 2]])
    assert one.index.lookup(keys_of(2)) == Hit(2)


def test_close_ends_everything(geometry_of) -> None:
    """Whatever is queued ends as failed, calls afterwards are harmless, the thread is gone, the memory free."""
    one = Shop(geometry_of(("full",), 16), 1 << 20)
    assert one.move(0, keys_of(2), [[0, 1]])
    one.device.gate.clear()
    one.begin(1, keys_of(2, "b"), [[2, 3]])
    one.begin(2, keys_of(2, "c"), [[4, 5]])
    one.begin(3, keys_of(2), [[6, 7]], is_load=True)
    threading.Timer(0.05, one.device.gate.set).start()
    one.mover.close()
    assert not one.mover._thread.is_alive()
    one.mover.close()
    ended = dict(finished(one.mover, 3))
    assert ended[2] is False and ended[3] is False
    for ticket, has_succeeded in ended.items():
        one.index.finished(ticket, has_succeeded)
    assert one.index.lookup(keys_of(2)) == Miss() and list(one.index.wants(keys_of(2))) == [False, False]
    one.begin(4, keys_of(1, "d"), [[0]])
    assert finished(one.mover) == [(4, False)]
    one.index.finished(4, False)
    assert one.store.stats()["used_bytes"] == 0


def test_limits_are_checked_at_the_start(geometry_of) -> None:
    """Mutation: a store that silently keeps nothing."""
    with pytest.raises(
        ConfigError, match="host_store_bytes = 39 cannot hold one block of 4 tokens, which takes 40 bytes"
    ):
        HostStore({"host_store_bytes": 39}, geometry_of(("full", "recurrent"), 4))
    store = HostStore({"host_store_bytes": 40}, geometry_of(("full", "recurrent"), 4))
    store.mover(Bytes(geometry_of(("full", "recurrent"), 4))).close()
    with pytest.raises(ConfigError, match="one worker"):
        store.mover(Bytes(geometry_of(("full", "recurrent"), 4)))


# ---- under the manager ----------------------------------------------------------------------------------------------------


def save(bench, tokens, **kwargs) -> None:
    run = bench.admit(tokens, **kwargs)
    bench.step()
    bench.release(run)
    bench.step()


@pytest.mark.parametrize("shape", ["full", "full+window", "window", "full+window+recurrent"])
def test_blocks_leave_and_come_back(new_bench, shape: str) -> None:
    """Out at release, forgotten by the device, back before the sequence runs; the forward checks every position it sees."""
    bench = new_bench(shape, 24, 1 << 16)
    tokens = list(range(22))
    save(bench, tokens[:20])  # 20 = 5 blocks: the recurrent state stands at a boundary when they leave
    assert bench.manager.stats().held_blocks > 0, "leased until the save has ended"
    bench.run_transfers()
    assert bench.manager.stats().held_blocks == 0
    bench.manager.reset_prefix_cache()
    found = bench.lookup(tokens)
    assert (found.num_cached_tokens, found.num_store_blocks, found.is_later) == (0, 5, False)
    run = bench.load(tokens)
    assert bench.lookup(tokens).is_later, "the blocks are on their way for another sequence"
    bench.step()
    bench.manager.check_integrity()
    bench.run_transfers()
    assert run.kv.ticket is None and run.kv.num_ready_tokens == 20
    assert bench.lookup(tokens).num_cached_tokens == 20, "published: others find it too"
    assert bench.place(run)
    for _ in range(6):
        bench.step()
        assert bench.advance(run, 1)
    bench.manager.check_integrity()
    assert bench.manager.stats().store_tokens == 20
    bench.close()


def test_leased_blocks_are_not_given_to_others(new_bench) -> None:
    """A save under way keeps its blocks, however great the need. Mutation: `begin_save` without the lease (wrong bytes saved)."""
    bench = new_bench("full", 6, 1 << 16)
    tokens = list(range(17))
    save(bench, tokens)
    stats = bench.manager.stats()
    assert (stats.held_blocks, stats.free_blocks) == (4, 2)
    assert bench.admit(list(range(100, 112))) is None
    other = bench.admit(list(range(100, 108)))
    bench.step()
    bench.release(other)
    bench.run_transfers()
    bench.manager.reset_prefix_cache()
    run = bench.load(tokens)
    bench.step()
    bench.run_transfers()
    assert bench.place(run)
    bench.step()
    run.tokens += list(range(6))
    assert bench.advance(run, 1)
    bench.step()
    bench.manager.release(run.kv, save=False)
    assert bench.manager.stats().held_blocks == 0, "told not to save, all is available at once"
    bench.close()


def test_a_failed_load_leaves_the_device_hit(new_bench) -> None:
    """The sequence goes on with what it had, and computes the rest. Mutation: `_move_on` regardless (wrong contents)."""
    bench = new_bench("full+window+recurrent", 24, 1 << 16)
    tokens = list(range(20))
    save(bench, tokens)
    bench.run_transfers()
    bench.manager.reset_prefix_cache()
    save(bench, tokens[:8])
    bench.run_transfers()
    assert bench.lookup([*tokens, 1]).num_store_blocks == 3
    run = bench.load([*tokens, 1])
    bench.step()
    bench.run_transfers(lambda transfer: False)
    assert run.kv.ticket is None and run.kv.num_ready_tokens == 8
    assert bench.manager.stats().store_failures == 1
    assert bench.place(run)
    bench.step()
    bench.manager.check_integrity()
    bench.close()


def test_later_becomes_a_hit(new_bench) -> None:
    """A save still on the way, its device copy forgotten: wait aside, look again, then load. Mutation: Later taken for a miss."""
    bench = new_bench("full", 24, 1 << 16)
    tokens = list(range(17))
    save(bench, tokens)
    bench.manager.reset_prefix_cache()
    found = bench.lookup(tokens)
    assert found.is_later and found.num_store_blocks == 0
    bench.run_transfers()
    found = bench.lookup(tokens)
    assert not found.is_later and found.num_store_blocks == 4
    assert bench.manager.lookup(tokens, use_store=False).num_store_blocks == 0
    assert bench.manager.lookup(tokens, salt="other").num_store_blocks == 0
    bench.close()


def test_aborted_load_is_published_when_it_lands(new_bench) -> None:
    """Nobody waits any more, the blocks are held till the end, then found. Mutation: free them at the abort (then written late)."""
    bench = new_bench("full+window", 12, 1 << 16)
    tokens = list(range(21))
    save(bench, tokens)
    bench.run_transfers()
    bench.manager.reset_prefix_cache()
    run = bench.load(tokens)
    bench.step()
    bench.release(run)
    bench.manager.check_integrity()
    stats = bench.manager.stats()
    assert stats.used_blocks == 0 and stats.held_blocks > 0
    bench.run_transfers()
    bench.manager.check_integrity()
    assert bench.lookup(tokens).num_cached_tokens == 20 and bench.manager.stats().held_blocks == 0
    assert bench.admit(tokens) is not None
    bench.step()
    bench.close()


def test_other_models_never_hit(new_bench, geometry_of) -> None:
    """The fingerprint is part of the storage key. Mutation: storage key = block key."""
    bench = new_bench("full", 24, 1 << 16)
    tokens = list(range(17))
    save(bench, tokens)
    bench.run_transfers()
    other = type(bench)(geometry_of(("full",), 24, fingerprint="f1"))
    other.manager = type(bench.manager)(other.geometry, index=bench.store.index())
    assert other.manager.lookup(tokens).num_store_blocks == 0
    same = type(bench.manager)(geometry_of(("full",), 24, fingerprint="f0"), index=bench.store.index())
    assert same.lookup(tokens).num_store_blocks == 4
    bench.close()
