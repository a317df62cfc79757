"""An engine whose worker is a checksum: everything of the real one but the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_core.engine.engine import Engine
from xllm_core.engine.executor import InProcessExecutor, ThreadExecutor
from xllm_core.engine.policy import Fcfs
from xllm_core.engine.scheduler import Scheduler, SchedulerLimits
from xllm_core.kv.host_store import HostStore
from xllm_core.kv.manager import KVManager
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec, KVTensorSpec
from xllm_core.testing.fakes import ChecksumWorker
from xllm_core.types import EngineRequest, SamplingParams

VOCAB = 97
BLOCK = 4


def geometry(num_blocks: int, window: int | None = None) -> KVGeometry:
    """Full attention, and beside it a sliding window if one is asked for."""
    tensors = (KVTensorSpec("k", (1, 1), "int64"),)
    groups = [KVGroupSpec("full", "full", (0,), tensors)]
    if window is not None:
        groups.append(KVGroupSpec("window", "sliding_window", (1,), tensors, window))
    count = len(groups)
    return KVGeometry(tuple(groups), BLOCK, (num_blocks,) * count, (BLOCK * 8,) * count, "BSGD", "test")


@dataclass
class Rig:
    """An engine, and the parts of it that tests look into."""

    engine: Engine
    worker: ChecksumWorker
    store: HostStore | None

    def run(
        self, requests: Sequence[EngineRequest], *, on_step: Callable[[int], None] | None = None, max_steps: int = 5000
    ) -> dict[Any, Any]:
        """Tokens and reasons by (request id, index); integrity is checked after every step."""
        tokens: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        for request in requests:
            self.engine.submit(request)
        for step in range(max_steps):
            if not self.engine.has_work:
                return tokens
            for output in self.engine.step():
                tokens.setdefault((output.request_id, output.index), []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    self.reasons[output.request_id, output.index] = output.finish_reason
            self.engine.scheduler.kv.check_integrity()
            if on_step is not None:
                on_step(step)
        raise AssertionError(f"not done after {max_steps} steps: {self.engine.scheduler.live_sequences()}")

    def assert_nothing_is_held(self) -> None:
        """Blocks, slots and seats have all come back."""
        scheduler = self.engine.scheduler
        stats = scheduler.kv.stats()
        assert stats.used_blocks == 0, f"{stats.used_blocks} blocks leaked"
        assert sorted(scheduler._free_slots) == list(range(scheduler.limits.max_num_seqs)), "a slot leaked"
        assert scheduler._num_seats == 0, f"{scheduler._num_seats} seats leaked"
        assert not scheduler.live_sequences()


def build_rig(
    num_blocks: int = 64, *, window: int | None = None, policy: Any = None, has_store: bool = False, depth: int = 1,
    enable_prefix_cache: bool = True, is_threaded: bool = False, worker_type: type[ChecksumWorker] = ChecksumWorker, **limits: Any,
) -> Rig:  # fmt: skip
    """An engine of small limits (`SchedulerLimits`); whoever builds it closes `rig.engine`."""
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
    return Rig(Engine(scheduler, executor, vocab_size=VOCAB, depth=depth), worker, store)


def request(name: str, prompt: Sequence[int], max_tokens: int = 8, **fields: Any) -> EngineRequest:
    """Greedy unless `temperature` says otherwise; fields of EngineRequest and of SamplingParams, told apart by name."""
    of_request = {
        k: fields.pop(k) for k in ("emitted", "priority", "salt", "eos_token_ids", "arrival_s") if k in fields
    }
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, **fields})
    return EngineRequest(name, tuple(prompt), params, seed=7, **of_request)
