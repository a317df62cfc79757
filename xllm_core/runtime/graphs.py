"""Decode steps from recorded graphs: when one is recorded, when it is replayed, and what counts as its work.

A step is replayed where every row is one token whose logits are sampled: all of steady decoding. Graphs are kept by bucket, the most rows they
serve, and recorded when a bucket is first needed. Their inputs lie in tensors that stay where they are; a step copies its own into them.
Source of the buckets: xLLM's adaptive graph mode, arXiv:2510.14686.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xllm_core.plugins.contracts.attention import AttentionKernel
from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.graphs import Graph, GraphDevice, GraphKernel, NotCapturableError
from xllm_core.plugins.contracts.model import ForwardContext, Model
from xllm_core.runtime.inputs import StepInputs
from xllm_core.types import StepPlan

log = logging.getLogger("xllm.engine")


@dataclass(slots=True)
class GraphStats:
    """Counted since the start. num_eager: decode steps that no graph could serve. padded_rows: rows of buckets that replays left empty.

    arena_bytes: memory that graphs share, which is what the largest needs. num_ops: calls of the largest graph. why_not: why none is recorded
    any more.
    """

    num_captures: int = 0
    num_replays: int = 0
    num_eager: int = 0
    padded_rows: int = 0
    arena_bytes: int = 0
    num_ops: int = 0
    why_not: str = ""


@dataclass(slots=True)
class _Recorded:
    graph: Graph
    logits: torch.Tensor
    plans: Mapping[str, Any]


class DecodeGraphs:
    """Graphs of one model on one device. Owned by the model runner; not thread-safe.

    max_rows: most sequences of a step. max_blocks: columns of a block table. kernels: by KV group, each a `GraphKernel`.
    """

    def __init__(
        self, device: GraphDevice, model: Model, kernels: Mapping[str, GraphKernel], *, max_rows: int, max_blocks: int
    ) -> None:
        self.stats = GraphStats()
        self._device, self._model, self._kernels, self._max_blocks = device, model, kernels, max_blocks
        self._buckets = buckets(max_rows)
        self._order = list(range(max_rows))
        self._recorded: dict[int, _Recorded] = {}
        most = self._buckets[-1]
        self._token_ids = device.allocate((most,), torch.int64)
        self._positions = device.allocate((most,), torch.int64)
        self._kv_slots = {group: device.allocate((most,), torch.int64) for group in kernels}

    def covers(self, plan: StepPlan) -> bool:
        """Whether a plan is a decode step, and graphs can still be had."""
        num_rows = len(plan.slots)
        is_decode = (
            plan.num_tokens == num_rows and plan.sample_rows == self._order[:num_rows] and not plan.prompt_logprobs
        )
        if is_decode and self.stats.why_not:
            self.stats.num_eager += 1
        return is_decode and not self.stats.why_not

    def logits(self, inputs: StepInputs) -> torch.Tensor | None:
        """[R, V] float32 of a step that is covered, until the next one; None where the forward turns out not to be capturable."""
        num_rows = len(inputs.token_ids)
        bucket = next(size for size in self._buckets if size >= num_rows)
        self._load(inputs, num_rows, bucket)
        recorded = self._recorded.get(bucket)
        if recorded is None:
            recorded = self._record(inputs, bucket)
            return None if recorded is None else recorded.logits[:num_rows]
        self._refill(recorded.plans, inputs)
        recorded.graph.replay(num_rows)
        self.stats.num_replays += 1
        self.stats.padded_rows += bucket - num_rows
        return recorded.logits[:num_rows]

    def _load(self, inputs: StepInputs, num_rows: int, bucket: int) -> None:
        self._token_ids[:num_rows] = inputs.token_ids
        self._positions[:num_rows] = inputs.positions
        self._token_ids[num_rows:bucket] = 0
        self._positions[num_rows:bucket] = 0
        for group, slots in self._kv_slots.items():
            slots[:num_rows] = inputs.kv_slots[group]
            slots[num_rows:bucket] = -1

    def _refill(self, plans: Mapping[str, Any], inputs: StepInputs) -> None:
        for group, kernel in self._kernels.items():
            kernel.refill(plans[group], inputs.layouts[group])

    def _record(self, inputs: StepInputs, bucket: int) -> _Recorded | None:
        plans = {group: kernel.graph_plan(bucket, self._max_blocks) for group, kernel in self._kernels.items()}
        self._refill(plans, inputs)
        try:
            graph, logits = self._device.capture(lambda: self._forward(bucket, plans), bucket)
        except NotCapturableError as error:
            self.stats.why_not = str(error)
            self.stats.num_eager += 1
            log.info("decode steps are not replayed from graphs: %s", error)
            return None
        stats = self.stats
        stats.num_captures += 1
        stats.arena_bytes = max(stats.arena_bytes, graph.arena_bytes)
        stats.num_ops = max(stats.num_ops, graph.num_ops)
        self._recorded[bucket] = recorded = _Recorded(graph, logits, plans)
        return recorded

    def _forward(self, bucket: int, plans: Mapping[str, Any]) -> torch.Tensor:
        slots = {group: all_slots[:bucket] for group, all_slots in self._kv_slots.items()}
        ctx = ForwardContext(self._positions[:bucket], slots, plans)
        hidden = self._model.embed(self._token_ids[:bucket])
        for layer in self._model.layers:
            hidden = layer(hidden, ctx)
        return self._model.head(hidden)


def buckets(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then multiples of 16, up to the first that holds `max_rows`."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_rows:
        sizes.append(max(16, sizes[-1] + 16) if sizes[-1] >= 16 else 16)
    return (*tuple(size for size in sizes if size < max_rows), next(size for size in sizes if size >= max_rows))


def why_no_graphs(device: DeviceBackend, kernels: Mapping[str, AttentionKernel]) -> str:
    """Why steps cannot be replayed here, or ""."""
    if not hasattr(device, "capture"):
        return f"{device.facts().name} records no graphs"
    lacking = [
        group for group, kernel in kernels.items() if not (hasattr(kernel, "graph_plan") and hasattr(kernel, "refill"))
    ]
    return f"the attention kernel of KV group {lacking[0]!r} has no plans that stay in place" if lacking else ""
