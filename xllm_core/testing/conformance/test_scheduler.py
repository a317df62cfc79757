"""Scheduling policies: pure functions over random queues, and in a real scheduler whose worker tells when a block was wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from xllm_core.plugins.contracts.scheduler import SequenceView
from xllm_core.testing.plugin import Kit, kit_of
from xllm_core.testing.subject import Part

QUEUES = 150
PATIENCE_S = 3600


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every policy."""
    parts = kit_of(metafunc.config).subject.parts("scheduler")
    metafunc.parametrize("part", parts, ids=[part.offer.name for part in parts])


@pytest.fixture
def policy(part: Part, xllm_kit: Kit) -> Any:
    """A policy of its own for each test."""
    return xllm_kit.importable(part).build()


def queues(count: int = QUEUES) -> list[list[SequenceView]]:
    """Random snapshots: every length from one, new and preempted sequences, equal and unequal ones."""
    draw = random.Random(5)
    return [[view(draw, i) for i in range(draw.choice((1, 1, 2, 3, 8, 40)))] for _ in range(count)]


def view(draw: random.Random, order: int) -> SequenceView:
    """One random sequence."""
    prompt, output, limit = draw.randint(1, 500), draw.choice((0, 0, draw.randint(0, 50))), draw.randint(51, 400)
    return SequenceView(
        request_id=f"r{order}", arrival_order=order, arrival_s=draw.choice((0.0, draw.random() * 100)), priority=draw.randint(-2, 2),
        is_offline=draw.random() < 0.3, prompt_tokens=prompt, output_tokens=output, max_tokens=limit,
        todo_tokens=draw.randint(1, prompt + output), num_preemptions=draw.choice((0, 0, 3)),
        deadline_s=draw.choice((None, draw.random() * 200)), predicted_step_s=draw.choice((None, 0.02)),
    )  # fmt: skip


def test_orders_name_each_sequence_once(part: Part, policy: Any) -> None:
    """The orders of admission and of giving way name every sequence exactly once."""
    for queue in queues():
        for name in ("order", "victims"):
            found = list(getattr(policy, name)(queue, 120.0))
            assert sorted(found) == list(range(len(queue))), f"{name} of {len(queue)} sequences gives {found}"


def test_it_is_pure(part: Part, policy: Any, xllm_kit: Kit) -> None:
    """The same question gets the same answer, whatever was asked in between and whoever asks."""
    asked = [(queue, name) for queue in queues(60) for name in ("order", "victims")]
    first = [list(getattr(policy, name)(queue, 120.0)) for queue, name in asked]
    random.Random(1).shuffle(order := list(range(len(asked))))
    other = part.build()
    for i in order:
        queue, name = asked[i]
        assert list(getattr(policy, name)(queue, 120.0)) == first[i], f"{name} answers differently when asked again"
        assert list(getattr(other, name)(queue, 120.0)) == first[i], f"{name} of another instance answers differently"


def test_it_keeps_its_word(part: Part, policy: Any) -> None:
    """A static order depends on no clock and no progress; a policy that says it reads no priority reads none."""
    assert isinstance(policy.is_static, bool) and isinstance(policy.uses_priority, bool)
    for queue in queues(60):
        answer = list(policy.order(queue, 120.0))
        if policy.is_static:
            later = [replace(v, todo_tokens=1 + v.todo_tokens // 2, output_tokens=v.output_tokens + 3) for v in queue]
            assert list(policy.order(queue, 9e5)) == answer, "is_static is True, and the order changes with the clock"
            assert list(policy.order(later, 120.0)) == answer, "is_static is True, and the order changes with progress"
        if not policy.uses_priority:
            other = [replace(v, priority=-v.priority + i) for i, v in enumerate(queue)]
            assert list(policy.order(other, 120.0)) == answer, (
                "uses_priority is False, and the order changes with priorities"
            )


def test_chunks_stay_in_bounds(part: Part, policy: Any) -> None:
    """A chunk is at most what is left of the sequence and of the budget, and never negative."""
    draw = random.Random(3)
    for queue in queues():
        budget = draw.choice((1, 2, 7, 64, 2048))
        for sequence in queue:
            want = policy.chunk(sequence, budget)
            most = min(sequence.todo_tokens, budget)
            assert isinstance(want, int) and 0 <= want <= most, f"chunk gives {want} where 0 to {most} is possible"


def test_nobody_starves(part: Part, policy: Any) -> None:
    """Among equals that keep coming, and behind shorter ones, everybody is admitted within an hour of waiting."""
    for old in (_job(0, 20, 0.0), _job(0, 400, 0.0)):
        waiting, order = [old], 1
        for now in range(PATIENCE_S):
            waiting += [_job(order, 20, float(now))]  # as many come as are served
            order += 1
            gone = waiting.pop(next(iter(policy.order(waiting, float(now)))))
            if gone is old:
                break
        else:
            pytest.fail(
                f"a request of {old.prompt_tokens} tokens still waits after {PATIENCE_S} s, {order - 1} newer ones went before"
            )


def _job(order: int, tokens: int, arrival_s: float) -> SequenceView:
    return SequenceView(f"r{order}", order, arrival_s, 0, False, tokens, 0, 16, tokens, 0)


@pytest.mark.parametrize("blocks", [16, 64])
@pytest.mark.parametrize("chunk", [0, 5])
def test_in_a_scheduler(part: Part, policy: Any, blocks: int, chunk: int) -> None:
    """In a real scheduler everybody finishes with its own tokens, budgets are kept, and nothing stays held."""
    from xllm_core.testing.engine_rig import VOCAB, build_rig, request
    from xllm_core.testing.fakes import expected_tokens

    draw = random.Random(blocks + chunk)
    requests = [
        request(
            f"r{i}", [draw.randrange(VOCAB) for _ in range(draw.randint(1, 30))], draw.randint(2, 20), n=draw.choice((1, 1, 2)),
            temperature=1.0, priority=draw.randint(0, 2) if policy.uses_priority else 0,
        )
        for i in range(14)
    ]  # fmt: skip
    rig = build_rig(blocks, policy=policy, max_chunk_tokens=chunk)
    try:
        got = rig.run(requests)
        for plan in rig.worker.plans:
            assert plan.num_tokens <= rig.engine.scheduler.limits.max_num_batched_tokens, "a step went over its budget"
        for one in requests:
            for index in range(one.params.n):
                wanted = expected_tokens(one, index, vocab_size=VOCAB, max_new=one.params.max_tokens or 0)
                assert got[one.request_id, index] == wanted, f"{one.request_id}[{index}] got other tokens than its own"
        rig.assert_nothing_is_held()
    finally:
        rig.engine.close()
