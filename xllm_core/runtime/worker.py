"""One process, one device: built from an assembly, then driven by plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.attention import AttentionKernel
from xllm_core.plugins.contracts.device import AsyncDevice, DeviceBackend, LazyMemoryDevice
from xllm_core.plugins.contracts.graphs import GraphDevice, GraphKernel
from xllm_core.plugins.contracts.kv import KVGeometry, KVMover, KVStore
from xllm_core.plugins.contracts.model import Model
from xllm_core.plugins.contracts.sampling import LogitsProcessor, Sampler
from xllm_core.runtime.graphs import GraphStats, StepGraphs
from xllm_core.runtime.inputs import InputBuffers
from xllm_core.runtime.kv_cache import KVCache, PagesAhead
from xllm_core.runtime.model_runner import ModelRunner, RunnerHandle
from xllm_core.runtime.sampling_state import SamplingState
from xllm_core.types import PendingResult, StepPlan, StepResult


@dataclass(slots=True)
class WorkerParts:
    """Everything a worker is made of, already chosen and built; see `xllm_core.engine.build`.

    bind_kv: gives each attention layer its cache tensors. has_graphs: device and kernels are `GraphDevice` and `GraphKernel`, and wanted as such.
    """

    device: DeviceBackend
    model: Model
    kernels: Mapping[str, AttentionKernel]
    copy_blocks: Callable[..., None]
    sampler: Sampler
    processors: list[LogitsProcessor]
    bind_kv: Callable[[KVCache], None]
    has_graphs: bool = False


class Worker:
    """Runs plans in order on one device. Owned and called by one thread; a `TellingWorker` and an `IdleWorker` of `engine.executor`."""

    def __init__(
        self, parts: WorkerParts, geometry: KVGeometry, *, num_slots: int, max_model_len: int, store: KVStore | None = None,
    ) -> None:  # fmt: skip
        self.device = parts.device
        self.cache = KVCache(parts.device, geometry)
        parts.bind_kv(self.cache)
        inputs = InputBuffers(
            parts.device, geometry.groups, num_slots=num_slots, max_model_len=max_model_len, block_size=geometry.block_size,
        )  # fmt: skip
        sampling = SamplingState(parts.device, parts.processors, num_slots=num_slots)
        graphs = None
        if parts.has_graphs:
            graphs = StepGraphs(
                cast(GraphDevice, parts.device), parts.model, cast(Mapping[str, GraphKernel], parts.kernels), max_rows=num_slots,
                max_blocks=inputs.max_blocks,
            )  # fmt: skip
            if graphs.resident.token_ids.is_cpu and not isinstance(parts.device, AsyncDevice):
                inputs.resident = graphs.resident
        self._runner = ModelRunner(
            parts.device, parts.model, kernels=parts.kernels, inputs=inputs, cache=self.cache, sampler=parts.sampler,
            sampling=sampling, copy_blocks=parts.copy_blocks, graphs=graphs,
        )  # fmt: skip
        self._mover: KVMover | None = store.mover(self.cache) if store is not None else None
        self._pages = (
            PagesAhead(parts.device, self.cache, geometry) if isinstance(parts.device, LazyMemoryDevice) else None
        )
        self.on_launch: Callable[[], None] = lambda: None

    def execute(self, plan: StepPlan) -> RunnerHandle:
        """Apply the plan's state changes, start its KV transfers, run its forward. Transfers touch leased blocks only."""
        started_s = time.perf_counter()
        self._runner.apply(plan)
        if self._pages is not None:
            for group, _, _, block_ids in plan.kv.table_writes:
                self._pages.use(group, block_ids)
        if plan.kv.transfers:
            if self._mover is None:
                raise ConfigError("a plan moves KV blocks to a store, and this worker has none")
            self._mover.start(plan.kv.transfers)
        applied_s = time.perf_counter() - started_s
        handle = self._runner.forward(plan, self.on_launch)
        handle.times.prepare_s += applied_s
        return handle

    def idle(self) -> bool:
        """As `engine.executor.IdleWorker`."""
        return self._pages is not None and self._pages.get_some()

    def sample(self, handle: RunnerHandle) -> StepResult | PendingResult:
        """Choose tokens; report transfers that ended."""
        result = self._runner.sample(handle)
        if self._mover is not None:
            result.finished_transfers = self._mover.poll()
        return result

    def graph_stats(self) -> GraphStats | None:
        """What graphs did so far; None where there are none."""
        return self._runner.graphs.stats if self._runner.graphs is not None else None

    def close(self) -> None:
        """End the mover's threads."""
        if self._mover is not None:
            self._mover.close()
