"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.rig import VOCAB, Rig, geometry
from xllm_core.engine.engine import Engine
from xllm_core.engine.executor import InProcessExecutor, ThreadExecutor
from xllm_core.engine.policy import Fcfs
from xllm_core.engine.scheduler import Scheduler, SchedulerLimits
from xllm_core.kv.host_store import HostStore
from xllm_core.kv.manager import KVManager
from xllm_core.testing.fakes import ChecksumWorker


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(
        num_blocks: int = 64, *, window: int | None = None, policy: Any = None, has_store: bool = False, depth: int = 1,
        enable_prefix_cache: bool = True, is_threaded: bool = False, worker_type: type[ChecksumWorker] = ChecksumWorker, **limits: Any,
    ) -> Rig:  # fmt: skip
        shape = geometry(num_blocks, window)
        bounds = SchedulerLimits(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 256, **limits})
        store = HostStore({"host_store_bytes": 1 << 20}, shape) if has_store else None
        worker = worker_type(shape, num_slots=bounds.max_num_seqs, vocab_size=VOCAB, store=store)
        manager = KVManager(
            shape, enable_prefix_cache=enable_prefix_cache, index=store.index() if store else None,
            max_chunk_tokens=bounds.max_chunk_tokens or bounds.max_num_batched_tokens,
        )  # fmt: skip
        scheduler = Scheduler(manager, policy or Fcfs(), bounds)
        executor = ThreadExecutor(worker) if is_threaded else InProcessExecutor(worker)
        rigs.append(Rig(Engine(scheduler, executor, vocab_size=VOCAB, depth=depth), worker, store))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.close()
