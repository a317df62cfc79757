"""Two plans in flight: planned before the forward ends, left alone after hand-over, and at most one row in vain per sequence."""

from __future__ import annotations

import logging
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest

from tests.engine.test_engine_properties import workload
from xllm_core.engine.build import plans_in_flight
from xllm_core.engine.metrics import early_share
from xllm_core.engine.scheduler import Scheduler
from xllm_core.errors import EngineDeadError
from xllm_core.plugins.contracts.kv import KVGroupSpec, KVTensorSpec
from xllm_core.testing.engine_rig import VOCAB, Rig, request
from xllm_core.testing.fakes import ChecksumWorker, FakeHandle, expected_tokens
from xllm_core.types import StepPlan, StepResult

MakeRig = Callable[..., Rig]
LONG_S = 30.0


class PatientWorker(ChecksumWorker):
    """Its forward lasts until the next step has been planned, or for `patience_s`: as long as it takes, however busy the machine is."""

    patience_s = 0.5

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.is_planned = threading.Condition()
        self.num_planned = 0

    def watch(self, scheduler: Scheduler) -> None:
        """Know of every plan that this scheduler makes."""
        schedule = scheduler.schedule

        def told() -> StepPlan:
            plan = schedule()
            with self.is_planned:
                self.num_planned = plan.step + 1
                self.is_planned.notify()
            return plan

        scheduler.schedule = told  # type: ignore[method-assign]

    def execute(self, plan: StepPlan) -> FakeHandle:
        if not plan.is_empty:
            with self.is_planned:
                self.is_planned.wait_for(lambda: self.num_planned > plan.step + 1, timeout=self.patience_s)
        return super().execute(plan)


@pytest.mark.parametrize(("depth", "is_threaded", "num_tokens"), [(2, True, 120), (1, True, 12), (1, False, 12)])
def test_steps_are_planned_while_the_one_before_runs(
    make_rig: MakeRig, depth: int, is_threaded: bool, num_tokens: int
) -> None:
    """By their time stamps, at least 90 % of them; and none with one plan in flight. Red if the engine waits before it plans."""
    rig = make_rig(400, depth=depth, is_threaded=is_threaded, worker_type=PatientWorker, max_num_seqs=9)
    assert isinstance(rig.worker, PatientWorker)
    if depth == 1:
        rig.worker.patience_s = 0.01
    rig.worker.watch(rig.engine.scheduler)
    rig.run([request(f"r{i}", [i] * (i + 1), num_tokens, ignore_eos=True) for i in range(9)])
    records = list(rig.engine.step_log.records)
    assert len(records) > num_tokens
    share = early_share(records)
    assert share >= 0.9 if depth == 2 else share == 0, share


def test_a_plan_is_not_touched_after_it_was_handed_over(make_rig: MakeRig) -> None:
    """Scheduler and worker share nothing but what is finished. Red if a plan holds a list that the scheduler goes on writing."""
    rig = make_rig(28, depth=2, is_threaded=True, has_store=True)
    copies: list[StepPlan] = []
    execute = rig.engine.executor.execute

    def keep(plan: StepPlan) -> Any:
        copies.append(deepcopy(plan))
        return execute(plan)

    rig.engine.executor.execute = keep  # type: ignore[method-assign]
    rig.run(workload(random.Random(3), 20))
    assert rig.engine.scheduler.stats.num_preemptions and rig.engine.scheduler.stats.num_forks
    assert len(copies) > 50
    assert rig.worker.plans == copies


class Waste:
    """Counts results that were dropped, by sequence."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.rows: Counter[int] = Counter()
        self.allowed: dict[int, int] = {}
        self._scheduler, self._update = scheduler, scheduler.update
        self._seen: list[Any] = []  # so that no id is used twice
        scheduler.update = self.update  # type: ignore[method-assign]

    def update(self, result: StepResult) -> Any:
        flight = self._scheduler._in_flight[0]
        for sequence, kv in [*flight.samples, *flight.partial]:
            if sequence.kv is not kv:
                self._seen.append(sequence)
                self.rows[id(sequence)] += 1
                self.allowed[id(sequence)] = 1 + sequence.num_preemptions
        return self._update(result)


@pytest.mark.parametrize("is_threaded", [False, True])
def test_a_sequence_wastes_at_most_one_row(make_rig: MakeRig, is_threaded: bool) -> None:
    """Over random lives with stops, aborts and preemptions (each of which may cost a row of its own). Red if a plan is made for somebody
    whose end is known, or if depth grows.
    """
    chance = random.Random(5)
    rig = make_rig(28, depth=2, is_threaded=is_threaded, max_num_seqs=6, max_chunk_tokens=7)
    waste, scheduler = Waste(rig.engine.scheduler), rig.engine.scheduler

    def abort_some(step: int) -> None:
        for request_id in list(scheduler.live_sequences()):
            if chance.random() < 0.02:
                rig.engine.abort(request_id)

    rig.run(workload(chance, 120), on_step=abort_some)
    stats = scheduler.stats
    assert stats.num_wasted_rows == sum(waste.rows.values())
    assert all(rows <= waste.allowed[sequence] for sequence, rows in waste.rows.items())
    assert min(stats.num_aborted, stats.num_preemptions, stats.num_finished) > 10, "too tame a life"
    assert 20 < stats.num_wasted_rows <= stats.num_finished + stats.num_aborted + stats.num_preemptions


def test_an_end_that_is_known_costs_nothing(make_rig: MakeRig) -> None:
    """A limit of tokens is seen when planning; only a stop token comes as a surprise, and costs one row."""
    rig = make_rig(400, depth=2, is_threaded=True)
    rig.run([request(f"r{i}", [i] * 5, 9, n=2, temperature=1.0) for i in range(20)])
    assert rig.engine.scheduler.stats.num_wasted_rows == 0
    whole = [request(f"w{i}", [i, i + 1], 20) for i in range(20)]
    stops = [expected_tokens(r, 0, vocab_size=VOCAB, max_new=20)[9] for r in whole]
    rig.run([request(f"s{i}", [i, i + 1], 20, stop_token_ids=(stop,)) for i, stop in enumerate(stops)])
    assert list(rig.reasons.values()) == ["stop"] * 20
    assert rig.engine.scheduler.stats.num_wasted_rows == 20


def test_a_failed_step_ends_the_engine_and_its_thread(make_rig: MakeRig) -> None:
    """Tokens that came before the failure are right, the error is the worker's own, and the engine can be closed."""
    rig = make_rig(64, depth=2, is_threaded=True)
    made = request("a", [1, 2, 3], 20)
    rig.engine.submit(made)
    execute = rig.worker.execute

    def broken(plan: StepPlan) -> Any:
        if plan.step == 6:
            raise MemoryError("out of device memory")
        assert plan.step < 6, "a plan ran after the failure"
        return execute(plan)

    rig.worker.execute = broken  # type: ignore[method-assign]
    tokens: list[int] = []
    with pytest.raises(MemoryError, match="out of device memory"):
        while True:
            for output in rig.engine.step():
                tokens.extend(output.new_token_ids)
    assert tokens == expected_tokens(made, 0, vocab_size=VOCAB, max_new=6)
    for call in (rig.engine.step, lambda: rig.engine.submit(request("b", [1], 2))):
        with pytest.raises(EngineDeadError, match="out of device memory"):
            call()
    rig.engine.close()
    assert not rig.engine.executor._thread._thread.is_alive()  # type: ignore[attr-defined]


def test_close_while_a_step_runs(make_rig: MakeRig) -> None:
    """An engine may be closed with plans in flight; it waits for the forward and for no other."""
    rig = make_rig(64, depth=2, is_threaded=True)
    rig.engine.submit(request("a", [1, 2, 3], 20))
    has_begun, may_end = threading.Event(), threading.Event()
    execute = rig.worker.execute

    def slow(plan: StepPlan) -> Any:
        if plan.step:
            has_begun.set()
            assert may_end.wait(LONG_S)
        return execute(plan)

    rig.worker.execute = slow  # type: ignore[method-assign]
    rig.engine.step()
    assert rig.engine.num_in_flight == 1
    assert has_begun.wait(LONG_S)
    threading.Timer(0.05, may_end.set).start()
    rig.engine.close()
    assert rig.engine.num_in_flight == 0
    assert not rig.engine.executor._thread._thread.is_alive()  # type: ignore[attr-defined]
    assert [plan.step for plan in rig.worker.plans] == [0, 1]


def test_an_interrupt_while_waiting_for_a_result(make_rig: MakeRig) -> None:
    """As a second Ctrl-C does: it is raised at once, the engine says so afterwards, and can be closed. Red if the wait cannot be broken."""
    rig = make_rig(64, depth=2, is_threaded=True)
    rig.engine.submit(request("a", [1, 2, 3], 20))
    may_end = threading.Event()
    execute = rig.worker.execute

    def slow(plan: StepPlan) -> Any:
        if plan.step == 3:
            while rig.engine.scheduler.stats.num_steps < 5:
                time.sleep(0.001)  # the engine is then inside the call that waits for this plan
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert may_end.wait(LONG_S)
        return execute(plan)

    rig.worker.execute = slow  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        while True:
            rig.engine.step()
    assert not may_end.is_set()
    with pytest.raises(EngineDeadError, match="KeyboardInterrupt"):
        rig.engine.step()
    may_end.set()
    rig.engine.close()
    assert [plan.step for plan in rig.worker.plans][:4] == [0, 1, 2, 3]


def test_there_is_no_third_plan(make_rig: MakeRig) -> None:
    """Its rows would need tokens of two steps before, which nobody could give."""
    with pytest.raises(ValueError, match="1 or 2 plans in flight, not 3"):
        make_rig(64, depth=3, is_threaded=False)


@pytest.mark.parametrize(
    ("kinds", "wants_overlap", "depth"),
    [
        (["full"], True, 2),
        (["full", "sliding_window"], True, 2),
        (["full", "recurrent"], True, 1),
        (["full"], False, 1),
    ],
)
def test_recurrent_models_run_without_overlap(
    kinds: Sequence[str], wants_overlap: bool, depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says why: a snapshot of a state must be taken before the next forward overwrites it."""
    groups = [KVGroupSpec(kind, kind, (0,), (KVTensorSpec("k", (1,), "float32"),)) for kind in kinds]
    with caplog.at_level(logging.INFO):
        assert plans_in_flight(groups, wants_overlap=wants_overlap) == depth
    is_refused = wants_overlap and depth == 1
    assert [("'recurrent'" in r.message and "overlap" in r.message) for r in caplog.records] == [True] * is_refused
