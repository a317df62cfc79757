"""Long random lives over a device that holds contents, weighted so that everything happens often, and counted to prove it.

Mutations of xllm_core/kv that this file was seen to catch, each alone: a shared tail written without a copy; a copy queued
without its table write; fork that leaves the capacity; withdraw that leaves the tree's entry; `fits` that counts the hit's own
blocks as room, for admit and for load; device blocks between hit and target of a load not held; what was on the way published
after a reset; blocks freed at the abort of a load; a window one position short; `can_rewind` always true; a rewound state not
written to the slot; no lease for a save or a load. Rules that only change what is cached have tests of their own in test_rules.py.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUM_OPS = 110


class Life:
    """Random operations on one bench. `seen` counts what happened; prompts come from few roots, so that prefixes meet."""

    def __init__(self, bench, seed: int, seen: Counter) -> None:
        self.bench, self.random, self.seen = bench, Random(seed), seen
        roots = Random(seed % 7)
        self.past = [[roots.randrange(3) for _ in range(24)] for _ in range(3)]

    def run(self, num_ops: int) -> None:
        operations = [
            (self.admit, 6), (self.steps, 8), (self.release, 3), (self.fork, 2), (self.rewind, 2), (self.preempt, 2),
            (self.reset, 0.15),
        ]  # fmt: skip
        if self.bench.store is not None:
            operations += [(self.load, 8), (self.transfers, 6), (self.place, 6), (self.abort_load, 2)]
        names, weights = zip(*operations, strict=True)
        for operation in self.random.choices(names, weights, k=num_ops):
            operation()
            self.bench.manager.check_integrity()
        self.finish()

    def finish(self) -> None:
        bench = self.bench
        while bench.runs or bench.loading:
            bench.release((bench.runs or bench.loading)[-1])
        bench.step()
        if bench.store is not None:
            bench.run_transfers()
            self.seen.update(bench.store.stats())
        bench.manager.check_integrity()
        stats = bench.manager.stats()
        assert stats.used_blocks == stats.held_blocks == 0, f"blocks leaked: {stats}"
        self.seen.update({name: getattr(stats, name) for name in stats.__slots__})
        bench.close()

    def prompt(self) -> list[int]:
        past = self.random.choice(self.past)
        return past[: self.random.randint(1, len(past))] + [
            self.random.randrange(3) for _ in range(self.random.randint(0, 5))
        ]

    def admit(self) -> None:
        if len(self.bench.runs) < 6:
            self.count("admit", self.bench.admit(self.prompt(), self.random.randint(1, 12)))

    def steps(self) -> None:
        for _ in range(self.random.randint(1, 4)):
            for run in list(self.bench.runs):
                if run not in self.bench.runs or run.must_wait or self.random.random() < 0.1:
                    continue
                if any(planned is run for planned, _, _ in self.bench.plan):
                    continue
                has_room = self.bench.advance(run, self.random.choice((1, 4, 7, 30)))
                self.count("advance", has_room)
                if not has_room and self.random.random() < 0.3:
                    self.end(run)
            self.bench.step(lambda run: self.random.randrange(2))

    def release(self) -> None:
        if run := self.pick(self.bench.runs):
            self.end(run)

    def end(self, run) -> None:
        self.past = [*self.past[-4:], run.tokens[:48]]
        self.bench.release(run)

    def fork(self) -> None:
        run = self.pick(self.bench.runs)
        if run and not run.must_wait and len(self.bench.runs) < 8:
            self.bench.fork(run)
            self.seen["forks"] += 1

    def rewind(self) -> None:
        run = self.pick(self.bench.runs)
        busy = [row[0] for row in self.bench.plan] + [run for pair in self.bench.forks for run in pair]
        if run is None or run in busy:
            return
        num_tokens = self.random.randint(max(0, run.num_computed - 9), run.num_computed)
        if self.random.random() < 0.3:
            num_tokens -= num_tokens % 4
        has_worked = self.bench.rewind(run, num_tokens)
        assert has_worked or any(group.kind != "full" for group in self.bench.geometry.groups)
        if has_worked:
            run.tokens += [self.random.randrange(3) for _ in range(self.random.randint(1, 5))]
        self.count("rewind", has_worked)

    def preempt(self) -> None:
        if self.bench.runs:
            self.end(self.bench.runs[-1])

    def reset(self) -> None:
        self.bench.manager.reset_prefix_cache()

    def load(self) -> None:
        if len(self.bench.loading) < 3:
            if self.random.random() < 0.25:
                self.bench.manager.reset_prefix_cache()  # or the device has what the store has
            prompt = self.prompt() if self.random.random() < 0.3 else [*self.random.choice(self.past), 1]
            self.count("load", self.bench.load(prompt))

    def transfers(self) -> None:
        odds = self.random.choice((1, 1, 0.7))
        self.bench.run_transfers(lambda transfer: self.random.random() < odds)

    def place(self) -> None:
        run = self.pick([run for run in self.bench.loading if run.kv.ticket is None])
        if run and len(self.bench.runs) < 8:
            self.count("place", self.bench.place(run, self.random.randint(1, 12)))

    def abort_load(self) -> None:
        if run := self.pick(self.bench.loading):
            self.seen["aborted_loads"] += run.kv.ticket is not None
            self.bench.release(run)

    def pick(self, runs):
        return self.random.choice(runs) if runs else None

    def count(self, name: str, result: object) -> None:
        self.seen[name if result is not None and result is not False else f"{name} refused"] += 1


def live(make_bench, num_examples: int) -> Counter:
    """Many lives, from seeds that hypothesis chooses."""
    seen: Counter = Counter()

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def one(seed: int) -> None:
        Life(make_bench(), seed, seen).run(NUM_OPS)

    one()
    return seen


@pytest.mark.parametrize("num_blocks", [11, 40])
@pytest.mark.parametrize("shape", ["full", "full+window", "window", "full+window+recurrent"])
def test_contents_and_counts_hold_in_any_order_of_events(new_bench, shape: str, num_blocks: int) -> None:
    """Every forward reads what its prefix says; after each event the counts agree; a refusal leaves no trace; nothing leaks."""
    seen = live(lambda: new_bench(shape, num_blocks), 12)
    expected = {"admit", "advance", "forks", "rewind", "hit_tokens", "evicted_blocks", "cow_copies"}
    if num_blocks == 11:
        expected |= {"admit refused", "advance refused"}
    if shape != "full":
        expected.add("rewind refused")
    if "recurrent" in shape:
        expected.add("snapshots")
    missing = {name for name in expected if seen[name] < 5}
    assert not missing, f"these never or hardly happened, so this test proves little: {missing}; {dict(seen)}"


@pytest.mark.parametrize("store_bytes", [800, 20_000])
@pytest.mark.parametrize("shape", ["full", "full+window", "window", "full+window+recurrent"])
def test_contents_and_counts_hold_with_a_store(new_bench, shape: str, store_bytes: int) -> None:
    """The same with saves at each release, loads that arrive late, fail, or find nobody waiting any more."""
    seen = live(lambda: new_bench(shape, 18, store_bytes), 22)
    expected = {
        "load",
        "place",
        "aborted_loads",
        "store_tokens",
        "store_saves",
        "store_failures",
        "loaded_blocks",
        "hits",
    }
    missing = {name for name in expected if seen[name] < 5}
    assert not missing, f"these never or hardly happened, so this test proves little: {missing}; {dict(seen)}"
    assert store_bytes > 800 or seen["evicted_blocks"] > 5, dict(seen)
