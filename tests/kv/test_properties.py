"""Lives of sequences as hypothesis makes them up: shorter than those of test_random_lives.py, and shrunk when they fail."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

SETTINGS = settings(
    max_examples=12, stateful_step_count=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TOKENS = st.integers(0, 1)  # few, so that sequences share prefixes and compute the same ones at once
PROMPTS = st.lists(TOKENS, min_size=1, max_size=22)
CHUNKS = st.integers(1, 9)


class Lives(RuleBasedStateMachine):
    """Admit, extend, fork, rewind, release, preempt and reset, in any order, with a pool that is often too small."""

    def __init__(self, bench) -> None:
        super().__init__()
        self.bench = bench
        self.finished: list[list[int]] = []

    @rule(prompt=PROMPTS, chunk=CHUNKS)
    def admit(self, prompt, chunk) -> None:
        self.bench.admit(prompt, chunk)

    @precondition(lambda self: self.finished)
    @rule(data=st.data(), tail=PROMPTS, chunk=CHUNKS)
    def admit_follow_up(self, data, tail, chunk) -> None:
        self.bench.admit(data.draw(st.sampled_from(self.finished))[:40] + tail[:5], chunk)

    @precondition(lambda self: self.bench.runs)
    @rule(data=st.data(), chunk=CHUNKS)
    def advance_one(self, data, chunk) -> None:
        self.bench.advance(data.draw(st.sampled_from(self.bench.runs)), chunk)

    @precondition(lambda self: self.bench.runs)
    @rule(data=st.data())
    def fork(self, data) -> None:
        run = data.draw(st.sampled_from(self.bench.runs))
        if not run.must_wait and len(self.bench.runs) < 8:
            self.bench.fork(run)

    @precondition(lambda self: self.bench.runs)
    @rule(data=st.data(), tail=st.lists(TOKENS, min_size=1, max_size=6))
    def rewind(self, data, tail) -> None:
        run = data.draw(st.sampled_from(self.bench.runs))
        if (
            run.must_wait
            or any(row[0] is run for row in self.bench.plan)
            or any(run in pair for pair in self.bench.forks)
        ):
            return
        num_tokens = data.draw(st.integers(0, run.num_computed))
        is_full_only = all(group.kind == "full" for group in self.bench.geometry.groups)
        if self.bench.rewind(run, num_tokens):
            run.tokens += tail
        else:
            assert not is_full_only, "a group that keeps every position refused to go back"

    @precondition(lambda self: self.bench.runs)
    @rule(data=st.data())
    def release(self, data) -> None:
        run = data.draw(st.sampled_from(self.bench.runs))
        self.finished = [*self.finished[-3:], run.tokens.copy()]
        self.bench.release(run)

    @precondition(lambda self: self.bench.runs)
    @rule(chunk=CHUNKS)
    def preempt_newest(self, chunk) -> None:
        run = self.bench.runs[-1]
        self.bench.release(run)
        self.bench.admit(run.tokens, chunk)

    @rule(tokens=st.lists(TOKENS, min_size=8, max_size=8), num_steps=st.integers(1, 3), chunk=CHUNKS)
    def steps(self, tokens, num_steps, chunk) -> None:
        for _ in range(num_steps):
            for run in self.bench.runs:
                self.bench.advance(run, chunk)
            self.bench.step(lambda run: tokens[self.bench.runs.index(run) % 8] if run in self.bench.runs else 0)
            self.counts_agree()

    @invariant()
    def counts_agree(self) -> None:
        self.bench.manager.check_integrity()

    def teardown(self) -> None:
        for run in [*self.bench.runs, *self.bench.loading]:
            if run in self.bench.runs or run in self.bench.loading:
                self.bench.release(run)
        self.bench.step()
        if self.bench.mover is not None:
            self.bench.run_transfers()
        self.bench.manager.check_integrity()
        stats = self.bench.manager.stats()
        assert stats.used_blocks == stats.held_blocks == 0, f"blocks leaked: {stats}"
        self.bench.close()


class LivesWithStore(Lives):
    """The same, with a host store: saves at every release, loads that arrive late, fail, or find nobody waiting."""

    @rule(prompt=PROMPTS, data=st.data())
    def load(self, prompt, data) -> None:
        if self.finished and data.draw(st.booleans()):
            prompt = data.draw(st.sampled_from(self.finished))[:40] + prompt
        self.bench.load(prompt)

    @rule(fail=st.integers(0, 4))
    def transfers(self, fail) -> None:
        self.bench.run_transfers(lambda transfer: (transfer.ticket + fail) % 5 != 0 or fail == 0)

    @precondition(lambda self: self.bench.loading)
    @rule(data=st.data(), chunk=CHUNKS)
    def place(self, data, chunk) -> None:
        run = data.draw(st.sampled_from(self.bench.loading))
        if run.kv.ticket is None:
            self.bench.place(run, chunk)

    @precondition(lambda self: self.bench.loading)
    @rule(data=st.data())
    def abort_while_loading(self, data) -> None:
        self.bench.release(data.draw(st.sampled_from(self.bench.loading)))

    @rule(odds=st.integers(0, 5))
    def forget_device(self, odds) -> None:
        if odds == 0:
            self.bench.manager.reset_prefix_cache()


@pytest.mark.parametrize("shape", ["full", "full+window", "full+window+recurrent"])
def test_lives_of_sequences(new_bench, shape: str) -> None:
    """Contents, counts, all-or-nothing and no leak. What fails here is shrunk to the few events that matter."""
    run_state_machine_as_test(lambda: LivesWithStore(new_bench(shape, 12, 2000)), settings=SETTINGS)
