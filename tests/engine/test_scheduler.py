"""The scheduler's rules, one by one, on plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from xllm_core.engine.engine import Engine
from xllm_core.engine.executor import InProcessExecutor
from xllm_core.engine.policy import Fcfs, Priority
from xllm_core.engine.scheduler import Scheduler, SchedulerLimits
from xllm_core.errors import (
    EngineDeadError,
    InvalidRequestError,
    PluginError,
    PromptTooLongError,
    QueueFullError,
    RequestTooLargeError,
)
from xllm_core.kv.manager import KVManager
from xllm_core.plugins.contracts.kv import Hit, Later, Miss
from xllm_core.plugins.contracts.scheduler import SequenceView
from xllm_core.testing.engine_rig import VOCAB, Rig, geometry, request
from xllm_core.testing.fakes import ChecksumWorker, RecordingMover, expected_tokens
from xllm_core.types import KVTransfer

MakeRig = Callable[..., Rig]


def test_a_step_stays_within_its_budgets_and_mixes_prefill_with_decode(make_rig: MakeRig) -> None:
    """Tokens, rows and chunk have their limits in every plan, and one plan holds pieces of prompts beside single tokens.

    Red if the budget is checked before a row instead of for it, or if prefill and decode take turns.
    """
    rig = make_rig(200, max_num_batched_tokens=20, max_num_seqs=5, max_chunk_tokens=9)
    rig.run([request(f"r{i}", [i] * (i * 7 + 1), 12) for i in range(9)])
    plans = [p for p in rig.worker.plans if not p.is_empty]
    for plan in plans:
        assert plan.num_tokens == sum(plan.lengths) <= 20
        assert len(plan.slots) <= 5
        assert len(set(plan.slots)) == len(plan.slots)
        assert max(plan.lengths) <= 9
    assert any(1 in plan.lengths and max(plan.lengths) > 1 for plan in plans), "no plan mixed prefill and decode"
    assert any(plan.num_tokens == 20 for plan in plans), "the budget was never used up"


def test_rows_point_at_the_previous_step(make_rig: MakeRig) -> None:
    """A decode row takes its token from the worker's own last sample: no token id travels back. Red if prev_rows is never used."""
    rig = make_rig(64)
    rig.run([request("a", [1, 2, 3], 10), request("b", [4, 5], 10)])
    decoding = [p for p in rig.worker.plans if p.lengths and max(p.lengths) == 1 and p.step > 0]
    assert decoding
    assert all(p.prev_rows == [0, 1] and not p.token_ids for p in decoding)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(Fcfs, ["low", "mid", "high"]), (Priority, ["high", "mid", "low"])],
    ids=["fcfs", "priority"],
)
def test_policies_order_admission(make_rig: MakeRig, policy: type[Fcfs], expected: list[str]) -> None:
    """One slot: who is served first is the policy's choice alone."""
    rig = make_rig(64, policy=policy(), max_num_seqs=1)
    order: list[str] = []
    for name, priority in (("low", 2), ("mid", 1), ("high", 0)):
        rig.engine.submit(request(name, [1, 2], 2, priority=priority if policy is Priority else 0))
    while rig.engine.has_work:
        order += [o.request_id for o in rig.engine.step() if o.finish_reason]
    assert order == expected


@pytest.mark.parametrize(("policy", "victim"), [(Fcfs, "last"), (Priority, "first")])
def test_policies_choose_who_gives_way(make_rig: MakeRig, policy: type[Fcfs], victim: str) -> None:
    """Two that outgrow the pool: the newest gives way, or the least important. Red if the victim is always the tail."""
    rig = make_rig(9, policy=policy(), max_num_seqs=2, enable_prefix_cache=False)
    rig.engine.submit(request("first", [1] * 12, 16, priority=int(policy is Priority)))
    rig.engine.step()
    rig.engine.submit(request("last", [2] * 12, 16, priority=0))
    preempted: list[str] = []
    while rig.engine.has_work:
        rig.engine.step()
        preempted += [s.request_id for s in rig.engine.scheduler.waiting if s.num_preemptions]
    assert preempted
    assert preempted[0] == victim


def test_a_policy_may_hold_a_prompt_back(make_rig: MakeRig) -> None:
    """`chunk` of 0 leaves a sequence for a later step, and neighbours go on."""

    class OneAtATime(Fcfs):
        def chunk(self, view: SequenceView, budget_tokens: int) -> int:
            return min(view.todo_tokens, budget_tokens, 2)

    rig = make_rig(64, policy=OneAtATime())
    got = rig.run([request("a", [3] * 11, 4)])
    assert got["a", 0] == expected_tokens(request("a", [3] * 11, 4), 0, vocab_size=VOCAB, max_new=4)
    assert max(n for p in rig.worker.plans for n in p.lengths) == 2


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (request("a", [1] * 256), PromptTooLongError, "256 tokens, the context holds 256.*at most 255"),
        (request("a", [1] * 10, 247), InvalidRequestError, r"prompt 10 \+ max_tokens 247 exceeds the context of 256.*246"),
        (request("a", [1] * 70, 20), RequestTooLargeError, r"prompt 70 \+ max_tokens 20 exceeds the KV pool of 80.*lower max_tokens to 11"),
        (request("a", [1] * 90, 5), RequestTooLargeError, "at most 80 tokens"),
        (request("a", [1], 4, priority=2), InvalidRequestError, 'priority = 2.*scheduler = "priority"'),
        (request("a", [1], 4, n=9), InvalidRequestError, "n = 9.*max_num_seqs = 8"),
        (request("a", []), InvalidRequestError, "prompt is empty"),
        (request("a", [VOCAB]), InvalidRequestError, f"token id {VOCAB}.*0..{VOCAB - 1}"),
        (request("a", [1], 4, emitted=((1,), (2,))), InvalidRequestError, "2 sequences for n = 1"),
        (request("a", [1], 4, emitted=((1, 2, 3, 4, 5),)), InvalidRequestError, "5 tokens are emitted already, max_tokens is 4"),
        (request("a", [1], 4, emitted=((1, 2, 3, 4),)), InvalidRequestError, "nothing to resume"),
        (request("a", [1], 4, emitted=((7,),), stop_token_ids=(7,)), InvalidRequestError, "nothing to resume"),
    ],
)  # fmt: skip
def test_what_can_never_run_is_refused_at_the_door(
    make_rig: MakeRig, made: Any, error: type[Exception], words: str
) -> None:
    """With both numbers, and without a trace: the same id can be used again."""
    rig = make_rig(20)
    with pytest.raises(error, match=words):
        rig.engine.submit(made)
    assert not rig.engine.has_work
    rig.engine.submit(request("a", [1, 2], 4))


def test_ids_in_use_and_full_queues_are_refused(make_rig: MakeRig) -> None:
    """A duplicate is the caller's mistake, a full queue is worth trying again."""
    rig = make_rig(64, max_waiting=2)
    rig.engine.submit(request("a", [1], 2))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        rig.engine.submit(request("a", [1], 2))
    rig.engine.submit(request("b", [1], 2))
    with pytest.raises(QueueFullError, match="2 sequences wait already") as caught:
        rig.engine.submit(request("c", [1], 2))
    assert caught.value.is_retryable


def test_max_tokens_none_ends_where_context_or_pool_end(make_rig: MakeRig) -> None:
    """As many as the context leaves, or as the pool can ever hold."""
    for blocks, room in ((100, 256), (10, 41)):
        rig = make_rig(blocks)
        got = rig.run([request("a", [1] * 5, None, ignore_eos=True)])  # type: ignore[arg-type]
        assert len(got["a", 0]) == room - 5
        assert rig.reasons["a", 0] == "length"


class SlowIndex:
    """A store that says Later a few times, then what it was told to say. Its loads end when the test says so."""

    def __init__(self, num_laters: int, answer: Hit | Miss) -> None:
        self.num_laters, self.answer = num_laters, answer
        self.num_lookups = 0

    def lookup(self, keys: Sequence[bytes]) -> Hit | Later | Miss:
        self.num_lookups += 1
        return Later() if self.num_lookups <= self.num_laters else self.answer

    def held(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return [True] * len(keys)

    def wants(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return [False] * len(keys)

    def planned(self, transfer: KVTransfer) -> None:
        """Nothing to note."""

    def finished(self, ticket: int, has_succeeded: bool) -> None:
        """Nothing to note."""


def make_waiting(index: SlowIndex, **limits: Any) -> tuple[Engine, ChecksumWorker, RecordingMover]:
    shape = geometry(64)
    bounds = SchedulerLimits(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 256, **limits})
    worker = ChecksumWorker(shape, num_slots=8, vocab_size=VOCAB)
    mover = RecordingMover()
    worker._mover = mover
    scheduler = Scheduler(KVManager(shape, index=index, max_chunk_tokens=32), Fcfs(), bounds)
    return Engine(scheduler, InProcessExecutor(worker), vocab_size=VOCAB), worker, mover


def test_later_is_passed_by_others_and_then_runs() -> None:
    """The head waits aside for its store, the next one runs; a Miss ends the wait. Red if WAITING_KV blocks the queue."""
    engine, _, _ = make_waiting(SlowIndex(5, Miss()))
    slow, quick = request("slow", [1] * 20, 6), request("quick", [2, 3], 3)
    engine.submit(slow)
    engine.submit(quick)
    first_rows: list[str] = []
    tokens: dict[str, list[int]] = {"slow": [], "quick": []}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id].extend(output.new_token_ids)
            first_rows.append(output.request_id)
    assert first_rows[0] == "quick"
    for made in (slow, quick):
        assert tokens[made.request_id] == expected_tokens(
            made, 0, vocab_size=VOCAB, max_new=made.params.max_tokens or 0
        )
    assert engine.scheduler.stats.num_waited_for_kv == 1


def test_a_store_that_never_answers_costs_a_bounded_wait() -> None:
    """After `max_store_wait_s` the prefix is computed, and the store is not asked again."""
    index = SlowIndex(10**9, Miss())
    engine, _, _ = make_waiting(index, max_store_wait_s=0.02)
    made = request("a", [1] * 20, 3)
    engine.submit(made)
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens.extend(output.new_token_ids)
    assert tokens == expected_tokens(made, 0, vocab_size=VOCAB, max_new=3)
    assert engine.scheduler.stats.num_store_timeouts == 1
    asked = index.num_lookups
    assert asked > 1


@pytest.mark.parametrize("has_succeeded", [True, False])
def test_a_load_waits_without_a_slot_and_its_failure_is_recomputed(has_succeeded: bool) -> None:
    """While blocks are on their way the sequence holds no slot and computes nothing; if the load fails, it computes them itself."""
    engine, worker, mover = make_waiting(SlowIndex(0, Hit(2)))
    made = request("a", [1] * 20, 3)
    engine.submit(made)
    for _ in range(3):
        assert engine.step() == []
    assert len(mover.started) == 1
    assert all(p.is_empty for p in worker.plans)
    transfer = mover.started[0]
    if has_succeeded:  # what a store would have written: the checksums of the prefix
        donor, donor_worker, _ = make_waiting(SlowIndex(0, Miss()))
        donor.submit(request("d", [1] * 20, 1))
        while donor.has_work:
            donor.step()
        table = donor_worker._tables[0][next(p.slots[0] for p in donor_worker.plans if p.slots)]
        for i, block in enumerate(transfer.block_ids[0]):
            worker.blocks[0][block] = donor_worker.blocks[0][table[i]]
    mover.ended.append((transfer.ticket, has_succeeded))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens.extend(output.new_token_ids)
    assert tokens == expected_tokens(made, 0, vocab_size=VOCAB, max_new=3)
    computed = sum(p.num_tokens for p in worker.plans)
    assert computed == 20 + 2 - (8 if has_succeeded else 0)
    engine.scheduler.kv.check_integrity()


def test_an_abort_while_a_load_is_under_way_leaks_nothing() -> None:
    """The blocks stay leased until the mover is done, and are free afterwards."""
    engine, _, mover = make_waiting(SlowIndex(0, Hit(2)))
    engine.submit(request("a", [1] * 20, 3))
    engine.step()
    assert engine.abort("a") == 1
    engine.step()
    assert engine.scheduler.kv.stats().held_blocks == 2
    mover.ended.append((mover.started[0].ticket, True))
    engine.step()
    stats = engine.scheduler.kv.stats()
    assert stats.held_blocks == stats.used_blocks == 0
    engine.scheduler.kv.check_integrity()


def test_n_waits_for_seats(make_rig: MakeRig) -> None:
    """A request of n sequences is admitted only when n slots are free, so that its forks always find one."""
    rig = make_rig(64, max_num_seqs=4)
    made = [request("a", [1, 2], 6, n=3), request("b", [3, 4], 6, n=3), request("c", [5], 6)]
    got = rig.run(made)
    for r in made:
        for index in range(r.params.n):
            assert got[r.request_id, index] == expected_tokens(r, index, vocab_size=VOCAB, max_new=6)
    assert max(len(p.slots) for p in rig.worker.plans) <= 4


def test_resuming_tells_of_sequences_that_were_over(make_rig: MakeRig) -> None:
    """Of two sequences one had ended: it is reported as ended, and the other goes on. Red if it is computed beyond its end."""
    rig = make_rig(64)
    made = request("a", [1, 2], 6, n=2, emitted=((3, 9), (4,)), stop_token_ids=(9,))
    got = rig.run([made])
    assert got["a", 0] == []
    assert rig.reasons["a", 0] == "stop"
    assert got["a", 1] == expected_tokens(made, 1, vocab_size=VOCAB, max_new=6)


def test_one_sequence_of_several_can_be_dropped(make_rig: MakeRig) -> None:
    """As a stop string does; the others go on."""
    rig = make_rig(64)
    made = request("a", [1, 2, 3], 10, n=3, temperature=1.0)
    rig.engine.submit(made)
    rig.engine.step()
    rig.engine.step()
    assert rig.engine.abort("a", 1) == 1
    rest = rig.run([])
    assert set(rest) == {("a", 0), ("a", 2)}
    rig.assert_nothing_is_held()


def test_an_id_used_again_does_not_hear_of_its_predecessor(make_rig: MakeRig) -> None:
    """Red if what was over already is still told after an abort."""
    rig = make_rig(64)
    rig.engine.submit(request("a", [1, 2], 6, n=2, emitted=((3, 9), (4,)), stop_token_ids=(9,)))
    rig.engine.abort("a")
    got = rig.run([request("a", [5], 3)])
    assert got == {("a", 0): expected_tokens(request("a", [5], 3), 0, vocab_size=VOCAB, max_new=3)}


def test_a_policy_that_breaks_its_contract_is_named(make_rig: MakeRig) -> None:
    """Red if what it chose is quietly cut to size."""

    class Greedy(Fcfs):
        def chunk(self, view: SequenceView, budget_tokens: int) -> int:
            return view.todo_tokens + 1

    rig = make_rig(64, policy=Greedy())
    rig.engine.submit(request("a", [1] * 5, 2))
    with pytest.raises(PluginError, match="Greedy wants 6 tokens of a sequence that has 5 to go"):
        rig.engine.step()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failed_step_ends_the_engine_with_a_word(make_rig: MakeRig, error: BaseException) -> None:
    """What is raised inside a step leaves it half done: nothing may run on that. Red if the next step mixes up two plans."""
    rig = make_rig(64)
    rig.engine.submit(request("a", [1, 2], 6))
    rig.engine.step()
    execute = rig.worker.execute

    def broken(plan: Any) -> Any:
        raise error

    rig.worker.execute = broken  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        rig.engine.step()
    rig.worker.execute = execute  # type: ignore[method-assign]
    for call in (rig.engine.step, lambda: rig.engine.submit(request("b", [1], 2))):
        with pytest.raises(EngineDeadError, match="a step of this engine failed"):
            call()
