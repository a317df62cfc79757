"""KV stores: what is saved comes back bit for bit, part of a chain is a partial hit, and nothing that is slow or dead holds up a step.

A store of scope "shared" or "remote" keeps its blocks in a process of its own. The kit can only kill, restart and pause it with help, in a
module given with `-p MODULE`::

    @pytest.fixture
    def xllm_store_peer():
        with MyPeer() as peer:      # an `xllm_core.testing.store_bench.StorePeer`: settings, kill, restart, pause, resume
            yield peer
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from xllm_core.plugins.contracts.queries import KVStoreQuery
from xllm_core.plugins.select import unfit_store
from xllm_core.testing.plugin import Kit, kit_of, optional_fixture
from xllm_core.testing.subject import Part

if TYPE_CHECKING:
    from xllm_core.testing.store_bench import StoreBench

FULL, WINDOW = (0, 1), (2,)
COUNTERS = ("stored_blocks", "loaded_blocks", "evicted_blocks", "hits", "misses", "laters", "used_bytes")


@dataclass(frozen=True, slots=True)
class Case:
    """A store for one layout and block size."""

    part: Part
    layout: str
    block_size: int

    @property
    def component(self) -> str:
        """Its line in the report."""
        return self.part.component


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every declared layout and block size; for the tests of conduct the first of each."""
    parts = kit_of(metafunc.config).subject.parts("kv_store")
    if "case" in metafunc.fixturenames:
        cases = []
        for part in parts:
            layouts, sizes = sorted(part.spec.layouts) or ["BSGD", "BGSD"], sorted(part.spec.block_sizes) or [4, 16]
            grid = [Case(part, layout, size) for layout in layouts for size in sizes]
            cases += grid if "round_trip" in metafunc.definition.originalname else grid[:1]
        metafunc.parametrize("case", cases, ids=[f"{c.part.offer.name}-{c.layout}-S{c.block_size}" for c in cases])
    elif "part" in metafunc.fixturenames:
        metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


@pytest.fixture
def peer(case: Case, request: pytest.FixtureRequest) -> Any:
    """The author's, for stores that have one; else None."""
    is_local = case.part.spec.scopes <= {"local"}
    return None if is_local else optional_fixture(request, "xllm_store_peer")


@pytest.fixture
def bench(case: Case, peer: Any, xllm_kit: Kit) -> Iterator[StoreBench]:
    """The store, built as an engine builds it; skips where its peer is not there."""
    from xllm_core.testing.store_bench import ByteView, StoreBench, geometry

    xllm_kit.importable(case.part)
    shape = geometry(case.layout, case.block_size)
    settings = {**xllm_kit.subject.table(), **(peer.settings if peer is not None else {})}
    try:
        store = case.part.build(settings, shape)
        made = StoreBench(store, shape, ByteView(shape))
    except Exception as error:
        if case.part.spec.scopes <= {"local"} or peer is not None:
            raise
        xllm_kit.no_device(f"it cannot reach its peer ({error}); give --xllm-config, or the fixture xllm_store_peer")
    yield made
    made.close()


def keys_for(bench: StoreBench, name: str, count: int) -> list[bytes]:
    """Keys that the store has never seen and wants; skips where it wants none."""
    import uuid

    from xllm_core.testing.store_bench import keys_of

    keys = keys_of(f"{name} {uuid.uuid4()}", count)
    wanted = list(bench.at_once("wants()", lambda: bench.index.wants(keys)))
    assert len(wanted) == count and all(isinstance(answer, bool) for answer in wanted), (
        f"wants() of {count} keys gives {wanted}"
    )
    if not all(wanted):
        pytest.skip(f"it wants {sum(wanted)} of {count} new blocks, so nothing can be saved")
    return keys


def test_round_trips_are_bit_exact(case: Case, bench: StoreBench) -> None:
    """Blocks of several groups come back bit for bit, into other blocks, each group its own."""
    import torch

    for groups, name in ((FULL, "full"), (WINDOW, "window")):
        keys = keys_for(bench, name, 5)
        saved = [2, 7, 0, 5, 3]
        assert bench.save(keys, saved, groups), "a save into an empty store failed"
        assert bench.settled(keys) == 5, "what was saved is not found"
        assert not any(bench.at_once("wants()", partial(bench.index.wants, keys))), "it wants blocks that it holds"
        before = [blocks.clone() for blocks in bench.view.blocks]
        target = [9, 12, 8, 15, 10]
        assert bench.load(keys, target, groups), "a load of what was found failed"
        for group, blocks in enumerate(bench.view.blocks):
            for source, into in zip(saved, target, strict=True):
                want = before[group][source if group in groups else into]
                assert torch.equal(blocks[into], want), (
                    f"group {group}: {int((blocks[into] != want).sum())} bytes of a block changed on their way"
                    if group in groups else f"group {group} was written, and the transfer names none of its blocks"
                )  # fmt: skip
            others = [i for i in range(len(blocks)) if i not in target]
            assert torch.equal(blocks[others], before[group][others]), (
                f"group {group}: blocks outside the transfer changed"
            )


def test_partial_hits(case: Case, bench: StoreBench) -> None:
    """Of a longer chain the leading part that is held is a hit; a chain that begins otherwise is a miss."""
    from xllm_core.testing.store_bench import keys_of

    keys, strange = keys_for(bench, "partial", 3), keys_of("never saved", 3)
    assert bench.settled(keys) == 0, "it holds what was never saved"
    assert bench.save(keys, [1, 2, 3], FULL)
    assert bench.settled([*keys, *strange]) == 3
    assert bench.settled([*keys[:2], strange[0], keys[2]]) == 2
    assert bench.settled([strange[0], *keys]) == 0, "a chain is held from its first block on, or not at all"


def test_blocks_by_themselves(case: Case, bench: StoreBench) -> None:
    """Which blocks are held is told for each, also behind one that is not: windows and states need no whole chain."""
    keys = keys_for(bench, "each", 4)
    assert bench.each(keys) == [False] * 4, "it holds what was never saved"
    assert bench.save([keys[0], keys[2]], [1, 2], WINDOW) and bench.settled(keys[2:3]) == 1
    assert bench.each(keys) == [True, False, True, False]


def test_a_load_of_nothing_fails_and_writes_nothing(case: Case, bench: StoreBench) -> None:
    """A load of blocks that are gone ends as failed, and leaves the device as it was."""
    import torch

    from xllm_core.testing.store_bench import keys_of

    before = [blocks.clone() for blocks in bench.view.blocks]
    assert not bench.load(keys_of("never saved", 2), [4, 5], FULL), "it loaded what it never had"
    assert all(torch.equal(a, b) for a, b in zip(before, bench.view.blocks, strict=True)), (
        "a failed load wrote to the device"
    )


def test_a_slow_device_blocks_no_call(case: Case, bench: StoreBench) -> None:
    """While a copy does not end, lookup, wants, planned, start and poll return at once."""
    keys, more = keys_for(bench, "slow", 2), keys_for(bench, "slow too", 2)
    gate = threading.Event()

    def wait() -> None:
        gate.wait(60)

    bench.view.reading = wait
    try:
        first = bench.begin(keys, [1, 2], FULL, is_load=False)
        for _ in range(3):
            bench.lookup(keys)
            bench.lookup(more)
            bench.at_once("wants()", lambda: bench.index.wants(more))
            bench.poll()
        second = bench.begin(more, [3, 4], FULL, is_load=False)
        bench.poll()
    finally:
        gate.set()
    assert bench.end(first) and bench.end(second), "a save failed because the device was slow"
    assert bench.settled(keys) == 2 and bench.settled(more) == 2


def test_a_broken_device_ends_the_ticket(case: Case, bench: StoreBench) -> None:
    """A copy that raises ends its transfer as failed; the store forgets the block and goes on."""

    def fail() -> None:
        raise RuntimeError("the device is gone")

    keys = keys_for(bench, "broken", 2)
    bench.view.reading = fail
    assert not bench.save(keys, [1, 2], FULL), "a save that could not read reports success"
    bench.view.reading = lambda: None
    assert bench.settled(keys) == 0, "it holds blocks that were never read"
    assert bench.save(keys, [1, 2], FULL), "it does not take the block again"
    bench.view.writing = fail
    assert not bench.load(keys, [8, 9], FULL), "a load that could not write reports success"


def test_it_counts(case: Case, bench: StoreBench) -> None:
    """Counters have the contract's names and move."""
    keys = keys_for(bench, "counted", 2)
    before = dict(bench.store.stats())
    assert set(COUNTERS) <= set(before), f"stats() lacks {', '.join(sorted(set(COUNTERS) - set(before)))}"
    bench.settled(keys)
    assert bench.save(keys, [1, 2], FULL) and bench.settled(keys) == 2 and bench.load(keys, [8, 9], FULL)
    after = bench.store.stats()
    moved = {name: after[name] - before[name] for name in ("stored_blocks", "loaded_blocks", "hits", "misses")}
    assert all(count > 0 for count in moved.values()), f"after a miss, a save, a hit and a load: {moved}"


def test_closing_ends_everything(case: Case, bench: StoreBench) -> None:
    """Closing returns, may be done again, and a transfer after it fails rather than hangs."""
    bench.at_once("close()", bench.mover.close)
    bench.at_once("a second close()", bench.mover.close)


def test_a_dead_peer_is_a_miss(case: Case, bench: StoreBench, peer: Any) -> None:
    """Its peer killed, calls still return, loads fail and lookups find nothing; restarted, it takes blocks again."""
    import uuid

    from xllm_core.testing.store_bench import keys_of

    _need(case, peer)
    keys = keys_for(bench, "killed", 2)
    assert bench.save(keys, [1, 2], FULL) and bench.settled(keys) == 2
    peer.kill()
    ticket = bench.begin(keys, [8, 9], FULL, is_load=True)
    assert not bench.end(ticket), "a load succeeded although the peer is dead"
    bench.settled(keys)
    peer.restart()
    for attempt in range(50):  # it may take a moment to find its peer again, and want nothing until then
        fresh = keys_of(f"restarted {attempt} {uuid.uuid4()}", 2)
        is_wanted = all(bench.at_once("wants()", partial(bench.index.wants, fresh)))
        if is_wanted and bench.save(fresh, [1, 2], FULL) and bench.settled(fresh) == 2:
            break
        threading.Event().wait(0.1)
    else:
        pytest.fail("after its peer was restarted it takes no block any more")
    assert bench.load(fresh, [8, 9], FULL)


def test_a_slow_peer_blocks_no_call(case: Case, bench: StoreBench, peer: Any) -> None:
    """Its peer paused, lookup, wants, start and poll still return at once; resumed, everything ends."""
    _need(case, peer)
    keys, more = keys_for(bench, "paused", 2), keys_for(bench, "paused too", 2)
    assert bench.save(keys, [1, 2], FULL) and bench.settled(keys) == 2
    peer.pause()
    try:
        tickets = [bench.begin(keys, [8, 9], FULL, is_load=True), bench.begin(more, [3, 4], FULL, is_load=False)]
        for _ in range(3):
            bench.lookup(keys)
            bench.lookup(more)
            bench.at_once("wants()", lambda: bench.index.wants(more))
            bench.poll()
    finally:
        peer.resume()
    for ticket in tickets:
        bench.end(ticket)


def _need(case: Case, peer: Any) -> None:
    if case.part.spec.scopes <= {"local"}:
        pytest.skip("scope local: it lives in this process, so there is no peer to kill or pause")
    if peer is None:
        pytest.skip("nobody says how to kill and restart its peer; define the fixture xllm_store_peer")


@pytest.mark.spec_only
def test_undeclared_is_refused(part: Part) -> None:
    """Layouts and block sizes that it does not declare are refused before anything is imported."""
    spec = part.spec
    layout, size = min(spec.layouts, default="BSGD"), min(spec.block_sizes, default=16)
    query = KVStoreQuery(device_kind="any", kv_layout=layout, block_size=size)
    assert not unfit_store(part.offer, query)
    if spec.layouts:
        assert unfit_store(part.offer, KVStoreQuery(device_kind="any", kv_layout="DGSB", block_size=size))
    if spec.block_sizes:
        assert unfit_store(
            part.offer, KVStoreQuery(device_kind="any", kv_layout=layout, block_size=max(spec.block_sizes) + 1)
        )
