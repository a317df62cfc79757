"""A device whose free KV blocks hold NaN: whoever reads what nobody wrote says so in every token that follows."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_core.config import Settings
from xllm_core.engine.build import BuiltEngine, build_engine
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import assemble
from xllm_core.testing.driving import drive
from xllm_core.types import EngineRequest, SamplingParams, StepPlan


def build(model: str, **flat: Any) -> BuiltEngine:
    settings = Settings.from_flags(
        path=model, dtype="float32", block_size=4, max_num_seqs=8, max_chunk_tokens=9, **flat
    )
    return build_engine(assemble(settings, PluginManager.discover(settings).load()), settings)


def requests() -> list[EngineRequest]:
    made = []
    for i in range(12):
        params = SamplingParams(max_tokens=14, temperature=i % 2 * 0.9, n=1 + i % 3, ignore_eos=True)
        made.append(EngineRequest(f"r{i}", (*range(5, 12 + 5 * (i % 4)), i), params, seed=i))
    return made


def drive_poisoned(built: BuiltEngine, made: list[EngineRequest]) -> tuple[dict[tuple[str, int], list[int]], int]:
    """Run requests; before each step everything in free blocks becomes NaN. Returns tokens, and how many blocks were poisoned."""
    engine, num_poisoned = built.engine, 0
    got: dict[tuple[str, int], list[int]] = {}
    for request in made:
        engine.submit(request)
    while engine.scheduler.live_sequences():
        for group in engine.scheduler.kv._groups:
            free = list(group.pool._free)
            num_poisoned += len(free)
            for tensor in built.worker.cache.tensors(group.index):
                tensor[free] = float("nan")
        for output in engine.step():
            got.setdefault((output.request_id, output.index), []).extend(output.new_token_ids)
    return got, num_poisoned


@pytest.mark.parametrize("has_cache", [True, False])
def test_poisoned_free_blocks_change_nothing(tiny_model: str, has_cache: bool) -> None:
    """Preemption, forks, chunks and prefix hits, over a pool that is too small.

    Red if a block is read before it is written, if attention looks past the end of a row, or if a freed block is still in a table.
    """
    clean = build(tiny_model, num_blocks=40, enable_prefix_cache=has_cache)
    expected = drive(clean.engine, requests())
    assert clean.engine.scheduler.stats.num_preemptions > 0
    clean.engine.close()
    poisoned = build(tiny_model, num_blocks=40, enable_prefix_cache=has_cache)
    got, num_poisoned = drive_poisoned(poisoned, requests())
    poisoned.engine.close()
    assert num_poisoned > 100
    assert got == expected


def test_the_poison_works(tiny_model: str) -> None:
    """Poison in a block that is in use does change the answer: otherwise the test above proves nothing."""
    clean = build(tiny_model, num_blocks=40)
    expected = drive(clean.engine, requests()[:1])
    clean.engine.close()
    broken = build(tiny_model, num_blocks=40)

    def poison_all(plan: StepPlan) -> None:
        if plan.step == 3:
            for tensor in broken.worker.cache.tensors(0):
                tensor.fill_(float("nan"))

    assert drive(broken.engine, requests()[:1], on_plan=poison_all) != expected
    broken.engine.close()
