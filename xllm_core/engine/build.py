"""From an assembly to a running engine: import what was chosen, build it, connect it. Runs once; nothing here is on the step path."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from xllm_core import __version__
from xllm_core.config_secrets import reveal
from xllm_core.engine.engine import Engine
from xllm_core.engine.executor import InProcessExecutor, T, ThreadExecutor, WorkerThread
from xllm_core.engine.metrics import StepLog
from xllm_core.engine.scheduler import Scheduler, SchedulerLimits
from xllm_core.errors import ConfigError, EngineDeadError
from xllm_core.kv.manager import KVManager
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec, KVStore
from xllm_core.plugins.contracts.sampling import ProcessorContext
from xllm_core.plugins.plan import AssemblyPlan

if TYPE_CHECKING:
    from xllm_core.config import Settings
    from xllm_core.plugins.contracts.attention import AttentionKernel
    from xllm_core.plugins.contracts.device import DeviceBackend
    from xllm_core.plugins.contracts.model import Model
    from xllm_core.plugins.contracts.weights import WeightMap
    from xllm_core.plugins.resolve import Assembly
    from xllm_core.runtime.kept_weights import KeptWeights
    from xllm_core.runtime.parts import CoreParts, WeightsInFormat
    from xllm_core.runtime.worker import Worker

log = logging.getLogger("xllm.engine")

_MEMORY_SHARE = 0.25  # of what is free, for KV, where the user gives no number
_WINDOW_SPARE_BLOCKS = 2

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights on its device. Its attention layers read the cache they were bound to last (`bind_kv`).

    parts: `runtime.parts.CoreParts`. load_s: seconds of building it and reading the weights.
    """

    device: DeviceBackend
    model: Model
    kernels: Mapping[str, AttentionKernel]
    ops: Mapping[str, Callable[..., Any]]
    parts: CoreParts
    load_s: float


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what it is made of."""

    engine: Engine
    worker: Worker
    geometry: KVGeometry
    loaded: LoadedModel
    store: KVStore | None


def load_model(assembly: Assembly, settings: Settings, *, progress: Progress | None = None) -> LoadedModel:
    """Build the plan's device, kernels, ops and model, and fill it. progress: called as (tensor name, bytes done, bytes in all)."""
    from xllm_core.runtime.loader import check_weights, load_weights
    from xllm_core.runtime.parts import CoreParts

    started_s = time.perf_counter()
    plan, config = assembly.plan, assembly.checkpoint.config
    weights = assembly.family.weight_map(config)
    check_weights(
        assembly.checkpoint, weights
    )  # before memory is asked for: an absurd size is a message, not an exhausted machine
    device: DeviceBackend = plan.device.build(plan.device_index)
    if settings.device.num_threads is not None:
        device.set_num_threads(settings.device.num_threads)
    kernels = {group: choice.build(device, plan.geometry[group]) for group, choice in plan.attention.items()}
    ops = {name: choice.build(device) for name, choice in plan.ops.items()}
    parts = CoreParts(
        device=device,
        dtype=plan.dtype,
        ops=ops,
        kernels=kernels,
        weights=_weights_in_format(assembly, weights),
        kv_write=plan.kv_write,
    )
    model = assembly.family.build(config, parts)
    _tell_packed(plan, weights, parts)
    kept = _kept_weights(assembly, settings, weights, parts)
    if kept is None or not kept.restore(parts, progress=progress):
        load_weights(assembly.checkpoint, weights, parts, progress=progress)
        if kept is not None:
            kept.keep(parts)
    return LoadedModel(device, model, kernels, ops, parts, time.perf_counter() - started_s)


def _kept_weights(assembly: Assembly, settings: Settings, weights: WeightMap, parts: CoreParts) -> KeptWeights | None:
    """Where the laid out weights of this model are, or would be, kept; None where they are not."""
    from xllm_core.runtime.kept_weights import KeptWeights, cache_directory, file_marks

    plan, layouts = assembly.plan, parts.layouts()
    if settings.model.weight_cache_bytes == 0 or layouts is None:
        return None
    made_by = [plan.model, plan.weight_format, plan.quantization, *plan.ops.values()]
    origins = [(one.name, one.target, one.version) for one in made_by if one is not None]
    what = [assembly.checkpoint.fingerprint(), plan.dtype, plan.quantized_kinds, "rank 0 of 1", repr(weights), layouts]
    files = file_marks(assembly.checkpoint)
    key = hashlib.sha256(json.dumps([__version__, what, origins, files]).encode()).hexdigest()
    return KeptWeights(cache_directory() / "weights", key, max_bytes=settings.model.weight_cache_bytes)


def _weights_in_format(assembly: Assembly, weights: WeightMap) -> WeightsInFormat | None:
    """The format that the plan names, or None."""
    from xllm_core.runtime.loader import packed_parameters
    from xllm_core.runtime.parts import WeightsInFormat

    plan = assembly.plan
    if plan.quantization is None:
        return None
    quantization = plan.quantization.build()
    if not plan.quantized_kinds:
        return WeightsInFormat(plan.quantized_ops, quantize=quantization.quantize)
    packed = packed_parameters(assembly.checkpoint, weights, plan.quantized_kinds)
    return WeightsInFormat(plan.quantized_ops, stack=quantization.stack, packed=packed)


def _tell_packed(plan: AssemblyPlan, weights: WeightMap, parts: CoreParts) -> None:
    """Of a format that files hold: how much of this one is served so."""
    if plan.quantization is None or not plan.quantized_kinds:
        return
    matrices = [entry for entry in weights.entries if len(entry.shape) == 2]
    served_so = {name for name, parameter in parts.parameters.items() if parameter.packed is not None}
    num_packed = sum(entry.param in served_so for entry in matrices)
    log.info(
        "%s: %d of %d matrices are served as the file packs them, %d in %s",
        plan.quantization.name, num_packed, len(matrices), len(matrices) - num_packed, plan.dtype,
    )  # fmt: skip


def build_engine(
    assembly: Assembly, settings: Settings, *, loaded: LoadedModel | None = None, progress: Progress | None = None,
    thread: WorkerThread | None = None,
) -> BuiltEngine:  # fmt: skip
    """Build what the plan names. loaded: a model of the same plan that another engine has no use for now; its cache binding moves here.

    thread: where `loaded` was loaded, which the engine takes over; by itself it makes what `worker_thread` says.
    """
    plan = assembly.plan
    thread = thread if thread is not None else worker_thread(settings)
    if loaded is None:
        loaded = call_in(thread, partial(load_model, assembly, settings, progress=_until_closed(progress, thread)))
    geometry = plan_geometry(assembly, settings, loaded.device)
    store = _build_store(plan, geometry)
    worker = call_in(thread, partial(_build_worker, assembly, settings, loaded, geometry, store))
    limits = SchedulerLimits(
        max_num_seqs=settings.scheduler.max_num_seqs, max_num_batched_tokens=settings.scheduler.max_num_batched_tokens,
        max_chunk_tokens=settings.scheduler.max_chunk_tokens, max_waiting=settings.scheduler.max_waiting,
        max_model_len=plan.max_model_len,
    )  # fmt: skip
    kv = KVManager(
        geometry, enable_prefix_cache=settings.kv.enable_prefix_cache, index=store.index() if store is not None else None,
        max_chunk_tokens=max_chunk_tokens(settings),
    )  # fmt: skip
    scheduler = Scheduler(kv, plan.scheduler.build(), limits)
    step_log = StepLog([choice.build() for choice in plan.observers])
    depth = plans_in_flight(geometry.groups, wants_overlap=settings.engine.overlap)
    executor = ThreadExecutor(worker, thread) if thread is not None else InProcessExecutor(worker)
    engine = Engine(scheduler, executor, vocab_size=assembly.shape.vocab_size, step_log=step_log, depth=depth)
    return BuiltEngine(engine, worker, geometry, loaded, store)


def worker_thread(settings: Settings) -> WorkerThread | None:
    """Where the worker is to live: a thread of its own if steps overlap, else the caller's."""
    return WorkerThread() if settings.engine.overlap else None


def call_in(thread: WorkerThread | None, function: Callable[[], T]) -> T:
    """Call a function where the worker lives."""
    return function() if thread is None else thread.call(function)


def _until_closed(progress: Progress | None, thread: WorkerThread | None) -> Progress | None:
    """Progress that ends the loading of weights when the caller has stopped waiting for it."""
    if thread is None:
        return progress
    ref = weakref.ref(thread)

    def report(name: str, done_bytes: int, total_bytes: int) -> None:
        thread = ref()
        if thread is None or thread.is_closed:
            raise EngineDeadError("the start of the engine was interrupted")
        if progress is not None:
            progress(name, done_bytes, total_bytes)

    return report


def _build_worker(
    assembly: Assembly, settings: Settings, loaded: LoadedModel, geometry: KVGeometry, store: KVStore | None
) -> Worker:
    from xllm_core.runtime.worker import Worker, WorkerParts

    plan, device = assembly.plan, loaded.device
    context = ProcessorContext(settings.scheduler.max_num_seqs, assembly.shape.vocab_size, device.facts().torch_device)
    return Worker(
        WorkerParts(
            device=device, model=loaded.model, kernels=loaded.kernels, copy_blocks=loaded.ops["block_copy"],
            sampler=plan.sampler.build(device), processors=[choice.build(context) for choice in plan.logits_processors],
            bind_kv=loaded.parts.bind_kv, has_graphs=_has_graphs(settings, loaded),
        ),
        geometry, num_slots=settings.scheduler.max_num_seqs, max_model_len=plan.max_model_len, store=store,
    )  # fmt: skip


def _has_graphs(settings: Settings, loaded: LoadedModel) -> bool:
    from xllm_core.runtime.graphs import why_no_graphs

    if not settings.engine.graphs:
        return False
    reason = why_no_graphs(loaded.device, loaded.kernels)
    if reason:
        log.info("decode steps are not replayed from graphs: %s", reason)
    return not reason


def plans_in_flight(groups: Sequence[KVGroupSpec], *, wants_overlap: bool) -> int:
    """2 where a step can be planned while the one before it runs, else 1."""
    if not wants_overlap:
        return 1
    recurrent = [group.name for group in groups if group.kind == "recurrent"]
    if recurrent:
        log.info(
            "[engine] overlap has no effect on this model: snapshots of its recurrent KV groups %s must be taken before the next forward "
            "overwrites the state, so each step is planned when the one before it has ended",
            recurrent,
        )
        return 1
    return 2


def plan_geometry(assembly: Assembly, settings: Settings, device: DeviceBackend) -> KVGeometry:
    """How many blocks each KV group gets: from [kv] num_blocks, or [kv] memory_bytes, or a share of what is free."""
    from xllm_core.runtime.kv_cache import block_bytes

    plan, kv = assembly.plan, settings.kv
    groups = tuple(assembly.kv_groups)
    sizes = tuple(block_bytes(group, plan.block_size) for group in groups)
    needs = tuple(_blocks_per_sequence(group, plan.block_size, plan.max_model_len) for group in groups)
    most = settings.scheduler.max_num_seqs
    if kv.num_blocks is not None:
        # The number speaks of the group that needs most; the others follow in proportion.
        counts = tuple(
            max(_blocks_at_least(g), -(-kv.num_blocks * need // max(needs)))
            for g, need in zip(groups, needs, strict=True)
        )
    else:
        budget = kv.memory_bytes if kv.memory_bytes is not None else int(device.memory().free_bytes * _MEMORY_SHARE)
        per_sequence = sum(size * need for size, need in zip(sizes, needs, strict=True))
        sequences = min(float(most), budget / per_sequence)
        counts = tuple(int(need * sequences) for need in needs)
        if any(count < _blocks_at_least(group) for group, count in zip(groups, counts, strict=True)):
            raise ConfigError(
                f"[kv] memory_bytes = {budget} holds {counts} KV blocks of {sizes} bytes, too few for a single short sequence; "
                f"one sequence of {plan.max_model_len} tokens takes {per_sequence} bytes"
            )
        lone = tuple(
            _blocks_of_a_step(g, plan.block_size, plan.max_model_len, max_chunk_tokens(settings)) for g in groups
        )
        wider = tuple(map(max, counts, lone))
        if sum(size * count for size, count in zip(sizes, wider, strict=True)) <= budget:
            counts = wider
    free = device.memory().free_bytes
    total = sum(size * count for size, count in zip(sizes, counts, strict=True))
    if total > free:
        raise ConfigError(
            f"{counts} KV blocks take {total} bytes, {plan.device.name} has {free} free; lower [kv] num_blocks or memory_bytes"
        )
    formed = (plan.quantization.name,) if plan.quantization else ()  # its KV differs, for the same tokens
    held = plan.dtype if plan.kv_dtype is None else f"{plan.dtype}, KV in {plan.kv_dtype}"
    parts = (assembly.checkpoint.fingerprint(), held, plan.kv_layout, str(plan.block_size), "rank 0 of 1")
    text = "|".join((*parts, *formed))
    return KVGeometry(groups, plan.block_size, counts, sizes, plan.kv_layout, hashlib.sha256(text.encode()).hexdigest())


def _blocks_per_sequence(group: KVGroupSpec, block_size: int, max_model_len: int) -> int:
    if group.kind == "recurrent":
        return 4  # the working state and a few snapshots to come back to
    tokens = max_model_len if group.window is None else min(max_model_len, group.window)
    return -(-tokens // block_size) + (0 if group.window is None else _WINDOW_SPARE_BLOCKS)


def _blocks_of_a_step(group: KVGroupSpec, block_size: int, max_model_len: int, chunk_tokens: int) -> int:
    """What a window needs for a sequence of any length: its own blocks and those of the largest step, or else a long prompt could never run."""
    if group.kind != "sliding_window" or group.window is None:
        return 0
    span = group.window - 1 + block_size - 1 + chunk_tokens
    return min(-(-max_model_len // block_size), -(-span // block_size) + 1)


def max_chunk_tokens(settings: Settings) -> int:
    """How many tokens of one sequence a step computes at most."""
    limits = settings.scheduler
    return min(limits.max_chunk_tokens or limits.max_num_batched_tokens, limits.max_num_batched_tokens)


def _blocks_at_least(group: KVGroupSpec) -> int:
    return 2 if group.kind == "recurrent" else 1


def _build_store(plan: AssemblyPlan, geometry: KVGeometry) -> KVStore | None:
    if plan.kv_store is None:
        return None
    settings = reveal(plan.plugin_settings.get(plan.kv_store.plugin, {}))
    store: KVStore = plan.kv_store.build(settings, geometry)
    return store
