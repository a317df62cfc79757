"""One rule of the manager at a time. The device of the bench holds contents, so most of these fail by wrong contents too."""

from __future__ import annotations

from random import Random

import pytest

from xllm_core.errors import ConfigError, IntegrityError
from xllm_core.kv.manager import KVManager

SIZE = 4
FAR = 10**6


def finish(bench, tokens, num_new=0):
    """Run a sequence to `num_new` tokens after its prompt and let it go; returns all its tokens."""
    run = bench.admit(tokens)
    bench.step()
    for _ in range(num_new):
        assert bench.advance(run, 1)
        bench.step()
    bench.release(run)
    bench.step()
    bench.manager.check_integrity()
    return run.tokens


def counted(first, num):
    return list(range(first, first + num))


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9, 12, 13])
def test_a_hit_leaves_at_least_one_token_to_compute(new_bench, num_tokens: int) -> None:
    """The last token's logits are wanted, and where its block is known it alone is computed. Mutation: `len(token_ids) // size` in lookup."""
    for kinds in ("full", "full+window"):
        bench = new_bench(kinds, 16)
        finish(bench, counted(0, 20))
        whole = num_tokens % SIZE == 0 and kinds == "full"  # a window may lack what a position inside a block sees
        expected = num_tokens - 1 if whole else (num_tokens - 1) // SIZE * SIZE
        assert bench.lookup(counted(0, num_tokens)).num_cached_tokens == expected


def test_a_whole_hit_writes_to_a_copy_of_the_last_block(new_bench) -> None:
    """Others may read the block that the tree knows. Mutation: `_num_committed` that counts the tail."""
    bench = new_bench("full", 16)
    finish(bench, counted(0, 9))
    runs = [bench.admit(counted(0, 8)) for _ in range(2)]
    assert [row[1:] for row in bench.plan] == [(7, 1), (7, 1)]
    (first, tail), (second, other) = (run.kv._tables[0] for run in runs)
    known = [node.blocks[0] for node in bench.manager.lookup(counted(0, 9))._path]
    assert first == second == known[0] and len({tail, other, known[1]}) == 3
    bench.step()
    bench.manager.check_integrity()
    for run in runs:
        bench.release(run)
    bench.step()
    assert bench.lookup(counted(0, 8)).num_cached_tokens == 7 and bench.manager.stats().cow_copies == 2


def test_a_whole_hit_needs_a_block_only_where_another_reads_it(new_bench) -> None:
    """A prompt that fills the pool is served from the cache, though no block is left for a copy. Mutations: `must_copy` always, or never."""
    bench = new_bench("full", 3)
    finish(bench, counted(0, 13)[:12])
    run = bench.admit(counted(0, 12))
    assert run is not None and bench.plan[0][1:] == (11, 1), "the block was taken from the tree"
    assert bench.lookup(counted(0, 12)).num_cached_tokens == 8
    bench.step()
    bench.release(run)
    bench.step()
    reader, more = bench.admit(counted(0, 9)), bench.lookup(counted(0, 8)).num_cached_tokens
    assert reader is not None and more == 7
    assert bench.admit(counted(0, 8)) is None, "its tail is read, and there is no block for a copy"
    bench.manager.check_integrity()


def test_tails_are_evicted_before_heads(new_bench) -> None:
    """A long cached prefix shrinks from its end. Mutation: release in ascending order makes the first eviction lose all."""
    bench = new_bench("full", 8)
    prompt = counted(0, 25)
    finish(bench, prompt)
    lengths = [bench.lookup(prompt).num_cached_tokens]
    for first in (100, 200, 300):
        run = bench.admit(counted(first, 8 * (first // 100)))
        bench.release(run)  # nothing of it was computed: it leaves no cached block
        lengths.append(bench.lookup(prompt).num_cached_tokens)
    assert lengths == [24, 24, 16, 8]


def test_least_recently_used_prefix_goes_first(new_bench) -> None:
    """Also where the last user computed blocks of its own: then the cached ones count as used. Mutation: no `touch` in `_let_go`."""
    bench = new_bench("full", 11)
    old, twin = counted(0, 9), counted(100, 9)
    first, second = bench.admit(twin), bench.admit(twin)  # both compute the same: the second's blocks stay private
    bench.step()
    bench.release(first)
    bench.step()
    finish(bench, old)
    bench.release(second)
    bench.step()
    assert bench.lookup(old).num_cached_tokens == bench.lookup(twin).num_cached_tokens == 8
    bench.admit(counted(200, 36))  # 9 of 11 blocks, 4 of them cached: two must go
    assert (bench.lookup(old).num_cached_tokens, bench.lookup(twin).num_cached_tokens) == (0, 8)


def test_private_twin_blocks_take_the_place_of_evicted_ones(new_bench) -> None:
    """Two compute the same; the published blocks are evicted; the second's serve from then on. Mutation: no attach in `_let_go`."""
    bench = new_bench("full", 8)
    twin = counted(0, 9)
    first, second = bench.admit(twin), bench.admit(twin)
    bench.step()
    bench.release(first)
    bench.release(bench.admit(counted(100, 20)))
    assert bench.lookup(twin).num_cached_tokens == 0
    bench.release(second)
    assert bench.lookup(twin).num_cached_tokens == 8
    bench.manager.check_integrity()


def test_nothing_is_found_before_it_is_computed(new_bench) -> None:
    """Mutation: publishing in admit, or commit of the planned instead of the computed length."""
    bench = new_bench("full", 16)
    run = bench.admit(counted(0, 13), chunk=6)
    assert bench.lookup(counted(0, 13)).num_cached_tokens == 0
    bench.step()
    assert bench.lookup(counted(0, 13)).num_cached_tokens == 4, "6 of 13 computed: one full block"
    assert bench.advance(run, FAR)
    assert bench.lookup(counted(0, 13)).num_cached_tokens == 4
    bench.step()
    assert bench.lookup(counted(0, 13)).num_cached_tokens == 12


def test_admission_counts_the_hit_it_is_about_to_use(new_bench) -> None:
    """Cached blocks of the hit cannot also be evicted for the rest. Mutation: `fits` without `num_pinned`."""
    bench = new_bench("full", 4)
    finish(bench, counted(0, 9))
    assert bench.manager.stats().cached_blocks == 2 and bench.manager.stats().free_blocks == 2
    assert bench.admit(counted(0, 17)) is None, "2 cached + 3 new of 4 blocks"
    assert bench.admit(counted(0, 16)) is not None
    bench.step()


def test_all_groups_or_none(new_bench) -> None:
    """The small group refuses, and the large one keeps no block. Mutation: admit that asks one group at a time."""
    bench = new_bench("full+window", (16, 3))
    assert bench.admit(counted(0, 13)) is None  # the bench compares everything before and after
    run = bench.admit(counted(0, 12))
    bench.step()
    run.tokens += counted(50, 9)
    assert not bench.advance(run, FAR), "the full group has room, the window's has not"
    stats = bench.manager.stats()
    assert stats.used_blocks + stats.free_blocks + stats.cached_blocks == 19


def test_appending_one_block_is_one_small_write(new_bench) -> None:
    """What a decoding step costs the worker. Mutation: rewriting whole tables in make_room."""
    bench = new_bench("full", 16)
    run = bench.admit(counted(0, 12))
    bench.step()
    assert run.kv.capacity_tokens == 12
    assert bench.advance(run, 1)
    changes = bench.manager._changes
    assert changes.table_writes == [(0, run.kv.slot, 3, [3])] and not changes.copies
    bench.step()
    for _ in range(3):
        assert bench.advance(run, 1) and not bench.manager._changes.table_writes, "room for a block is asked for once"
        bench.step()


@pytest.mark.parametrize("in_same_plan", [True, False])
def test_forks_copy_the_tail_once_each_and_the_last_keeps_it(new_bench, in_same_plan: bool) -> None:
    """n = 3 from one prompt, sampled from one row. Mutation: own_block that never copies, or capacity not lowered by fork."""
    bench = new_bench("full+window+recurrent", 24)
    run = bench.admit(counted(0, 10))
    if not in_same_plan:
        bench.step()
    runs = [run, bench.fork(run), bench.fork(run)]
    if in_same_plan:
        bench.step(next_token=lambda r: 100 + runs.index(r))
    else:
        for i, r in enumerate(runs):
            r.tokens[10:] = [100 + i]
    for _ in range(9):
        assert all(bench.advance(r, 1) for r in runs)
        bench.step(next_token=lambda r: 200 + runs.index(r))
        bench.manager.check_integrity()
    copies = bench.manager.stats().cow_copies
    assert copies == 2 * 3, "two of three sequences copy one tail block in each of three groups"
    for r in runs:
        bench.release(r)
    bench.manager.check_integrity()
    assert bench.manager.stats().used_blocks == 0


def test_a_published_tail_is_copied_or_taken_back(new_bench) -> None:
    """Going back into a published block: with room it is copied and stays found; in a full pool it leaves the tree.

    Mutation: own_block that writes to an owned block lets a later hit read other tokens' KV (seen as wrong contents).
    """
    for num_blocks, found_after in ((8, 8), (3, 4)):
        bench = new_bench("full", num_blocks)
        prompt = counted(0, 9)
        run = bench.admit(prompt)
        bench.step()
        assert bench.rewind(run, 6)
        run.tokens += [50, 51, 52, 53, 54][: 3 if num_blocks == 3 else 5]
        if num_blocks == 3:
            other = bench.admit([77])  # takes the last block
            assert other is not None
        assert bench.advance(run, 2)
        bench.step()
        bench.manager.check_integrity()
        assert bench.lookup(prompt).num_cached_tokens == found_after
        bench.release(run)
        again = bench.admit(prompt[: found_after + 1])
        assert again is not None and again.kv.num_ready_tokens == found_after
        bench.step()


def test_windows_let_go_and_refuse_to_go_back(new_bench) -> None:
    """Blocks behind the window become holes and room for others; what needs them again is refused.

    Mutations: `_first_needed` one too far (a hole inside the window is read), `can_rewind` always true, no `let_pass`.
    """
    bench = new_bench("full+window", (16, 6))
    run = bench.admit(counted(0, 20))
    bench.step()
    assert not bench.advance(bench.admit(counted(100, 3)), 1)
    assert bench.advance(run, 1)
    bench.step()
    # The next position is 21: the window of 6 sees 16 .. 21, and 3 full blocks are behind what position 20 saw.
    assert run.kv._tables[1][:3] == [-1, -1, -1] and run.kv._tables[1][3] >= 0
    assert not bench.rewind(run, 16), "position 16 would see 11, in a block that is gone"
    assert bench.rewind(run, 17)
    run.tokens += [9, 9]
    assert bench.advance(run, FAR)
    bench.step()
    assert bench.rewind(run, 0), "from the start nothing is needed"
    run.tokens += counted(0, 12)
    assert bench.advance(run, FAR)
    bench.step()


def test_sliding_window_sequences_outgrow_their_pool(new_bench, geometry_of) -> None:
    """With a known chunk the window's pool holds window and chunk only, and `capacity_tokens` says so.

    Checked at the boundary: one block less is not promised. Mutation: a smaller span in `_group_capacity` makes this stall.
    """
    for chunk in (1, 4, 7, 16):
        geometry = geometry_of(("sliding_window",), 64)
        enough = next(
            n for n in range(1, 64)
            if KVManager(geometry_of(("sliding_window",), n), max_chunk_tokens=chunk).capacity_tokens > 64 * SIZE
        )  # fmt: skip
        assert KVManager(geometry, max_chunk_tokens=chunk).capacity_tokens > 10**9
        assert (
            KVManager(geometry_of(("sliding_window",), enough - 1), max_chunk_tokens=chunk).capacity_tokens
            == (enough - 1) * 4
        )
        for first in range(1, 9):
            bench = new_bench("window", enough)
            run = bench.admit(counted(0, 200), chunk=min(first, chunk))
            bench.step()
            while run.num_computed < 200:
                assert bench.advance(run, chunk), f"{enough} blocks, chunk {chunk}, stuck at {run.num_computed}"
                bench.step()


def test_capacity_is_the_longest_sequence_that_fits(new_bench) -> None:
    """Exactly: one token more does not. Mutation: max over groups."""
    bench = new_bench("full+window+recurrent", (7, 5, 1))
    capacity = bench.manager.capacity_tokens
    assert capacity == 20
    assert bench.admit(counted(0, capacity + 1)) is None
    assert bench.admit(counted(0, capacity)) is not None
    bench.step()


def test_recurrent_states_come_back_from_snapshots_only(new_bench) -> None:
    """A hit needs the state at its end; chunks that end inside a block leave none. Mutation: snapshot at any commit (wrong state)."""
    bench = new_bench("full+window+recurrent", 24)
    run = bench.admit(counted(0, 20), chunk=8)
    bench.step()
    assert bench.advance(run, 6)
    bench.step()
    assert bench.manager.stats().snapshots == 1
    assert bench.lookup(counted(0, 20)).num_cached_tokens == 8, "computed 14, state kept at 8"
    assert not bench.rewind(run, 12) and not bench.rewind(run, 13)
    assert bench.rewind(run, 8)
    run.tokens += [5, 6, 7]
    assert bench.advance(run, FAR)
    bench.step()
    other = bench.admit(counted(0, 20))
    assert other.kv.num_ready_tokens == 8
    bench.step()


def test_the_only_snapshot_becomes_the_working_block(new_bench) -> None:
    """A pool of one state block still serves a hit: nothing else could be evicted. Mutation: `fits` that wants a second block."""
    bench = new_bench("full+window+recurrent", (8, 8, 2))
    finish(bench, counted(0, 8))
    assert bench.admit(counted(100, 3)) is not None
    bench.step()
    run = bench.admit(counted(0, 12))
    assert run is not None and run.kv.num_ready_tokens == 8
    bench.step()
    bench.manager.check_integrity()
    assert bench.lookup(counted(0, 12)).num_cached_tokens == 0, "its snapshot is a working state now"


def test_a_rewound_state_is_in_the_slot_at_once(new_bench) -> None:
    """Even if nothing is left to copy when the next step is planned. Mutation: no table write in RecurrentGroup.rewind."""
    bench = new_bench("full+window+recurrent", 24)
    run = bench.admit(counted(0, 10), chunk=8)
    bench.step()
    assert bench.advance(run, FAR)
    bench.step()
    assert bench.rewind(run, 8)
    bench.manager.reset_prefix_cache()  # the snapshot belongs to this sequence alone now
    run.tokens += [5, 6, 7]
    assert bench.advance(run, FAR)
    bench.step()


def test_a_shared_state_needs_a_block_of_its_own(new_bench) -> None:
    """A fork in a full pool of states is refused when it wants to go on. Mutation: `num_missing` of 0 for a shared state."""
    bench = new_bench("full+window+recurrent", (16, 16, 1))
    run = bench.admit(counted(0, 6))
    bench.step()
    twin = bench.fork(run)
    assert not bench.advance(run, 1) and not bench.advance(twin, 1)
    bench.release(run)
    assert bench.advance(twin, 1)
    bench.step()


def test_copies_that_must_be_come_before_copies_that_may_be(new_bench) -> None:
    """Two blocks are left: one to append, one to copy the block that a save reads; the block that only the tree knows is taken
    back. Mutation: make_room in table order copies that one instead, and runs out."""
    bench = new_bench("full", 4, 1 << 16)
    finish(bench, counted(0, 5))
    bench.run_transfers()
    bench.manager.reset_prefix_cache()  # block 0 is in the store, not on the device
    manager, tokens = bench.manager, counted(0, 8)
    source = manager.admit(manager.lookup(tokens, use_store=False), tokens, 8, 0)
    twin = manager.fork(source, 1)
    manager.commit(source, tokens, 8)
    manager.release(source)
    manager.check_integrity()
    assert manager.stats().held_blocks == 0 and sum(manager._groups[0].pool.leases) == 1
    assert manager.reserve(twin, 9)
    manager.check_integrity()
    assert manager.stats().cow_copies == 1
    bench.close()


def test_salts_do_not_meet(new_bench) -> None:
    """Tenants never see each other's prefixes. Mutation: commit or lookup without the salt."""
    bench = new_bench("full", 24)
    finish(bench, counted(0, 9))
    assert bench.lookup(counted(0, 9), salt="a").num_cached_tokens == 0
    run = bench.admit(counted(0, 9), salt="a")
    bench.step()
    assert bench.lookup(counted(0, 9), salt="a").num_cached_tokens == 8
    assert bench.lookup(counted(0, 9), salt="b").num_cached_tokens == 0
    bench.release(run)
    assert bench.manager.lookup(counted(0, 9), use_cache=False).num_cached_tokens == 0


def test_an_earlier_lookup_spares_hashing_but_changes_no_answer(new_bench) -> None:
    """Keys are reused, findings are not. Mutation: reuse across salts, or of the earlier path."""
    bench = new_bench("full", 24)
    tokens = counted(0, 21)
    early = bench.manager.lookup(tokens)
    finish(bench, tokens)
    early = bench.manager.lookup(tokens, previous=early)
    assert early.num_cached_tokens == 20
    assert bench.manager.lookup(tokens, previous=early).num_cached_tokens == 20
    assert bench.manager.lookup(tokens, salt="x", previous=early).num_cached_tokens == 0
    assert bench.manager.lookup([*tokens, 1, 2, 3, 4], previous=early).num_cached_tokens == 20


def test_reset_forgets_and_running_sequences_publish_nothing_old(new_bench) -> None:
    """After new weights nothing of before may be found. Mutation: leaving `_is_publishing` on."""
    bench = new_bench("full", 24)
    finish(bench, counted(0, 9))
    run = bench.admit(counted(50, 9))
    bench.step()
    assert bench.manager.reset_prefix_cache() == 4
    for _ in range(8):
        assert bench.advance(run, 1)
        bench.step()
    bench.release(run)
    bench.manager.check_integrity()
    assert bench.lookup(run.tokens).num_cached_tokens == 0 and bench.lookup(counted(0, 9)).num_cached_tokens == 0
    assert bench.manager.stats().free_blocks == 24
    finish(bench, counted(50, 9))
    assert bench.lookup(counted(50, 9)).num_cached_tokens == 8


def test_without_prefix_cache_all_blocks_come_back_free(geometry_of) -> None:
    """Mutation: publishing regardless."""
    manager = KVManager(geometry_of(("full",), 8), enable_prefix_cache=False)
    for _ in range(3):
        kv = manager.admit(manager.lookup(counted(0, 9)), counted(0, 9), 9, 0)
        manager.commit(kv, counted(0, 9), 9)
        assert kv.next_commit_tokens == 12
        manager.release(kv)
        manager.check_integrity()
        assert manager.stats().free_blocks == 8 and manager.lookup(counted(0, 9)).num_cached_tokens == 0


def test_misuse_is_said_aloud(new_bench, geometry_of) -> None:
    """Stale lookups, double releases, impossible commits and geometries raise; none goes on with wrong blocks."""
    bench = new_bench("full", 4)
    manager = bench.manager
    finish(bench, counted(0, 9))
    stale = bench.lookup(counted(0, 9))
    run = bench.admit(counted(100, 16))
    with pytest.raises(IntegrityError, match="look up again"):
        manager.admit(stale, counted(0, 9), 9, 1)
    with pytest.raises(IntegrityError, match="commit of 20 computed tokens, but 16 are known and blocks hold 16"):
        manager.commit(run.kv, run.tokens, 20)
    bench.release(run)
    for misuse in (manager.release, lambda kv: manager.fork(kv, 1), lambda kv: manager.rewind(kv, 0)):
        with pytest.raises(IntegrityError):
            misuse(run.kv)
    with pytest.raises(IntegrityError, match="transfer 7"):
        manager.finish_transfer(7, True)
    with pytest.raises(ConfigError, match="memory_bytes"):
        KVManager(geometry_of(("full",), 0))
    with pytest.raises(ValueError, match="'mystery' is unknown"):
        KVManager(geometry_of(("mystery",), 4))


@pytest.mark.parametrize("store_bytes", [0, 3000])
def test_a_thousand_random_aborts_leak_nothing(new_bench, store_bytes: int) -> None:
    """Aborts at every moment: planned, running, forked, loading. Mutation: any drop, unpin or unlease left out."""
    bench, random = new_bench("full+window+recurrent", 30, store_bytes), Random(7)
    num_aborts = 0
    while num_aborts < 1000:
        prompt = [random.randrange(2) for _ in range(random.randint(1, 24))]
        if store_bytes and random.random() < 0.3:
            bench.load(prompt)
        else:
            bench.admit(prompt, random.randint(1, 20))
        for run in bench.runs:
            bench.advance(run, random.randint(1, 5))
        if random.random() < 0.7:
            bench.step(lambda run: random.randrange(2))
        if bench.runs and random.random() < 0.3 and len(bench.runs) < 8 and not bench.runs[-1].must_wait:
            bench.fork(bench.runs[-1])
        if store_bytes and random.random() < 0.2:
            bench.run_transfers(lambda transfer: random.random() < 0.9)
        live = bench.runs + bench.loading
        while live and (len(live) > 5 or random.random() < 0.6):
            before = len(bench.runs) + len(bench.loading)
            bench.release(random.choice(live))
            live = bench.runs + bench.loading
            num_aborts += before - len(live)
    for run in list(bench.runs + bench.loading):
        if run in bench.runs or run in bench.loading:
            bench.release(run)
    bench.step()
    if store_bytes:
        bench.run_transfers()
    bench.manager.check_integrity()
    stats = bench.manager.stats()
    assert stats.used_blocks == stats.held_blocks == 0 and stats.free_blocks + stats.cached_blocks == stats.total_blocks
    assert bench.manager.reset_prefix_cache() == stats.cached_blocks and not bench.manager._tree.nodes
    bench.close()
