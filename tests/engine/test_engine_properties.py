"""Random workloads on an engine whose tokens betray every wrong block, with integrity checked after each step."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm_core.engine.policy import Fcfs, Priority
from xllm_core.testing.engine_rig import VOCAB, Rig, request
from xllm_core.testing.fakes import expected_tokens
from xllm_core.types import EngineRequest

MakeRig = Callable[..., Rig]


def workload(chance: random.Random, count: int, *, has_priorities: bool = False) -> list[EngineRequest]:
    """Prompts that share prefixes, forks, seeds, stops, resumed answers."""
    stem = [chance.randrange(VOCAB) for _ in range(40)]
    made = []
    for i in range(count):
        prompt = stem[: chance.randrange(0, 30)] + [chance.randrange(VOCAB) for _ in range(chance.randrange(1, 20))]
        n = chance.choice((1, 1, 1, 2, 3))
        emitted, stop = (), chance.randrange(VOCAB)
        if chance.random() < 0.2:
            others = [token for token in range(VOCAB) if token != stop]
            emitted = tuple(tuple(chance.choice(others) for _ in range(chance.randrange(0, 4))) for _ in range(n))
        made.append(
            request(
                f"r{i}", prompt, chance.randrange(5, 25), n=n, temperature=chance.choice((0.0, 1.0)), emitted=emitted,
                stop_token_ids=(stop,), priority=chance.randrange(3) if has_priorities else 0,
            )
        )  # fmt: skip
    return made


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000), blocks=st.sampled_from((20, 28, 60)), chunk=st.sampled_from((0, 3, 7)), depth=st.sampled_from((1, 2)),
    window=st.sampled_from((None, 9)), has_store=st.booleans(), policy=st.sampled_from((Fcfs, Priority)), is_threaded=st.booleans(),
)  # fmt: skip
def test_every_sequence_gets_its_own_tokens(
    make_rig: MakeRig,
    seed: int,
    blocks: int,
    chunk: int,
    depth: int,
    window: int | None,
    has_store: bool,
    policy: type[Fcfs],
    is_threaded: bool,
) -> None:
    """Whatever is switched on, outputs equal what the prefix alone determines, everybody finishes and nothing stays held.

    Red under each of: not resetting num_computed on preemption; forking without copy on write; committing before the forward; pointing
    prev_rows at the step before last; releasing a slot twice.
    """
    rig = make_rig(
        blocks, window=window, depth=depth, has_store=has_store, policy=policy(), max_chunk_tokens=chunk, is_threaded=is_threaded,
    )  # fmt: skip
    requests = workload(random.Random(seed), 10, has_priorities=policy is Priority)
    got = rig.run(requests)
    for r in requests:
        limit = r.params.max_tokens
        assert limit is not None
        for index in range(r.params.n):
            assert got[r.request_id, index] == expected_tokens(r, index, vocab_size=VOCAB, max_new=limit), (
                r.request_id,
                index,
            )
    rig.assert_nothing_is_held()


def test_pressure_really_preempts(make_rig: MakeRig) -> None:
    """The small pools of the property test are small enough: otherwise it proves nothing about preemption."""
    rig = make_rig(20)
    rig.run(workload(random.Random(1), 10))
    assert rig.engine.scheduler.stats.num_preemptions > 0
    assert rig.engine.scheduler.stats.num_forks > 0


@pytest.mark.parametrize(("depth", "is_threaded"), [(1, False), (2, False), (2, True)])
def test_a_thousand_aborts_leak_nothing(make_rig: MakeRig, depth: int, is_threaded: bool) -> None:
    """Requests cut at random points of their life give back blocks, slots and seats, and their neighbours' tokens stay right.

    Red if `_leave` forgets the slot, if abort leaves the sequence in `running`, or if a late result is given to a sequence that has gone.
    """
    chance = random.Random(depth)
    rig = make_rig(24, depth=depth, max_num_seqs=6, has_store=depth == 1 or is_threaded, is_threaded=is_threaded)
    engine, cut = rig.engine, 0
    survivors: dict[str, EngineRequest] = {}
    serial = 0
    got: dict[tuple[str, int], list[int]] = {}
    while cut < 1000:
        while len(engine.scheduler.live_sequences()) < 12:
            for r in workload(chance, 3):
                named = request(
                    f"s{serial}",
                    r.prompt_token_ids,
                    r.params.max_tokens or 1,
                    n=r.params.n,
                    temperature=r.params.temperature,
                )
                serial += 1
                engine.submit(named)
                survivors[named.request_id] = named
        for output in engine.step():
            got.setdefault((output.request_id, output.index), []).extend(output.new_token_ids)
        engine.scheduler.kv.check_integrity()
        for request_id in list(engine.scheduler.live_sequences()):
            if chance.random() < 0.25:
                engine.abort(request_id)
                survivors.pop(request_id, None)
                cut += 1
    for key, rest in rig.run([]).items():
        got.setdefault(key, []).extend(rest)
    for name, r in survivors.items():
        for index in range(r.params.n):
            want = expected_tokens(r, index, vocab_size=VOCAB, max_new=r.params.max_tokens or 0)
            assert got[name, index] == want, (name, index)
    assert survivors
    rig.assert_nothing_is_held()


def test_the_head_of_the_queue_does_not_starve(make_rig: MakeRig) -> None:
    """A request that needs most of the pool runs although small ones keep coming: the head is never skipped.

    Red if admission goes on to the next request when the head does not fit.
    """
    rig = make_rig(20, max_num_seqs=4, enable_prefix_cache=False)
    engine = rig.engine
    for i in range(4):
        engine.submit(request(f"small{i}", [i] * 8, 16))
    engine.step()
    engine.submit(request("big", [5] * 60, 8))
    finished_at: dict[str, int] = {}
    for step in range(400):
        if step < 200:
            engine.submit(request(f"late{step}", [step % VOCAB] * 8, 4))
        for output in engine.step():
            if output.finish_reason is not None:
                finished_at[output.request_id] = step
        if "big" in finished_at:
            break
    assert finished_at.get("big", 10**9) < 100, "the big request waited behind requests that came after it"
    assert sum(name.startswith("late") for name in finished_at) <= 4
