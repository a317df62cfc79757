"""Steps from recorded graphs: when one is recorded, when it is replayed, and what counts as its work.

A step is replayed whole where every row is one token whose logits are sampled: all of steady decoding. Where kernels take rows of any length, other
small steps are replayed up to the head: the end of a prompt whose prefix is known, short prompts, decoding beside them. In a long step the calls
cost little beside the work. Graphs are kept by bucket, the most tokens they serve, and recorded when a bucket is first needed. Their inputs lie in
tensors that stay where they are; a step copies its own into them. Source of the buckets: xLLM's adaptive graph mode, arXiv:2510.14686.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from xllm_core.plugins.contracts.attention import AttentionKernel
from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.graphs import Graph, GraphDevice, GraphKernel, NotCapturableError, RaggedGraphKernel
from xllm_core.plugins.contracts.model import ForwardContext, Model
from xllm_core.runtime.inputs import ResidentInputs, StepInputs
from xllm_core.types import StepPlan

log = logging.getLogger("xllm.engine")

RAGGED_BUCKETS = (32, 128)
"""Tokens of steps that are not steady decoding. Few, for each is recorded in some request's first step."""

_Refill = Callable[[Mapping[str, Any], StepInputs], None]
_Forward = Callable[[int, Mapping[str, Any]], torch.Tensor]


@dataclass(slots=True)
class GraphStats:
    """Counted since the start. num_eager: decode steps that no graph could serve. padded_rows: tokens of buckets that replays left empty.

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
    """parts: the first rows of the result, by their number: to cut them out takes longer than to look them up."""

    graph: Graph
    result: torch.Tensor
    plans: Mapping[str, Any]
    parts: dict[int, torch.Tensor] = field(default_factory=dict)

    def first(self, num_tokens: int) -> torch.Tensor:
        found = self.parts.get(num_tokens)
        if found is None:
            found = self.parts[num_tokens] = self.result[:num_tokens]
        return found


class StepGraphs:
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
        self._recorded_ragged: dict[int, _Recorded] = {}
        self._ragged = {name: kernel for name, kernel in kernels.items() if isinstance(kernel, RaggedGraphKernel)}
        self._most_ragged = RAGGED_BUCKETS[-1] if len(self._ragged) == len(kernels) else 0
        most = max(self._buckets[-1], self._most_ragged)
        token_ids, positions, *slots = (device.allocate((most,), torch.int64) for _ in range(2 + len(kernels)))
        self.resident = ResidentInputs(token_ids, positions, dict(zip(kernels, slots, strict=True)))

    def covers(self, plan: StepPlan) -> bool:
        """Whether a plan is a decode step, and graphs can still be had."""
        num_rows = len(plan.slots)
        is_decode = (
            plan.num_tokens == num_rows and plan.sample_rows == self._order[:num_rows] and not plan.prompt_logprobs
        )
        if is_decode and self.stats.why_not:
            self.stats.num_eager += 1
        return is_decode and not self.stats.why_not

    def covers_ragged(self, plan: StepPlan) -> bool:
        """Whether the layers of a plan that `covers` says no to can be had from a graph."""
        return 0 < plan.num_tokens <= self._most_ragged and not plan.prompt_logprobs and not self.stats.why_not

    def logits(self, inputs: StepInputs, on_launch: Callable[[], None]) -> torch.Tensor | None:
        """[R, V] float32 of a step that is covered, until the next one; None where the forward turns out not to be capturable.

        on_launch: called before a replay, when everything is laid out for it.
        """
        return self._run(inputs, on_launch, self._buckets, self._recorded, self._refill, self._forward)

    def hidden(self, inputs: StepInputs, on_launch: Callable[[], None]) -> torch.Tensor | None:
        """[T, H] after the last layer of a step that `covers_ragged`, else as `logits`."""
        return self._run(inputs, on_launch, RAGGED_BUCKETS, self._recorded_ragged, self._refill_ragged, self._layers)

    def _run(
        self, inputs: StepInputs, on_launch: Callable[[], None], sizes: Sequence[int], recorded: dict[int, _Recorded], refill: _Refill,
        forward: _Forward,
    ) -> torch.Tensor | None:  # fmt: skip
        num_tokens = len(inputs.token_ids)
        bucket = next(size for size in sizes if size >= num_tokens)
        self._load(inputs, num_tokens, bucket)
        found = recorded.get(bucket)
        if found is None:
            with torch.no_grad():  # not inference mode: that takes too long to enter for every replay, and what is made in it cannot leave it
                found = self._record(inputs, bucket, refill, forward)
            if found is None:
                return None
            recorded[bucket] = found
            return found.first(num_tokens)
        refill(found.plans, inputs)
        on_launch()
        found.graph.replay(num_tokens)
        self.stats.num_replays += 1
        self.stats.padded_rows += bucket - num_tokens
        return found.first(num_tokens)

    def _load(self, inputs: StepInputs, num_rows: int, bucket: int) -> None:
        kept = self.resident
        if not inputs.is_resident:
            kept.token_ids[:num_rows] = inputs.token_ids
            kept.positions[:num_rows] = inputs.positions
            for group, slots in kept.kv_slots.items():
                slots[:num_rows] = inputs.kv_slots[group]
        if kept.filled != (num_rows, bucket):  # else what the step before left empty is as it was
            kept.token_ids[num_rows:bucket] = 0
            kept.positions[num_rows:bucket] = 0
            for slots in kept.kv_slots.values():
                slots[num_rows:bucket] = -1
            kept.filled = (num_rows, bucket)

    def _refill(self, plans: Mapping[str, Any], inputs: StepInputs) -> None:
        for group, kernel in self._kernels.items():
            kernel.refill(plans[group], inputs.layouts[group])

    def _refill_ragged(self, plans: Mapping[str, Any], inputs: StepInputs) -> None:
        for group, kernel in self._ragged.items():
            kernel.refill_ragged(plans[group], inputs.layouts[group])

    def _record(self, inputs: StepInputs, bucket: int, refill: _Refill, forward: _Forward) -> _Recorded | None:
        plans = {group: kernel.graph_plan(bucket, self._max_blocks) for group, kernel in self._kernels.items()}
        refill(plans, inputs)
        try:
            graph, result = self._device.capture(lambda: forward(bucket, plans), bucket)
        except NotCapturableError as error:
            self.stats.why_not = str(error)
            self.stats.num_eager += 1
            log.info("steps are not replayed from graphs: %s", error)
            return None
        stats = self.stats
        stats.num_captures += 1
        stats.arena_bytes = max(stats.arena_bytes, graph.arena_bytes)
        stats.num_ops = max(stats.num_ops, graph.num_ops)
        return _Recorded(graph, result, plans)

    def _layers(self, bucket: int, plans: Mapping[str, Any]) -> torch.Tensor:
        slots = {group: all_slots[:bucket] for group, all_slots in self.resident.kv_slots.items()}
        ctx = ForwardContext(self.resident.positions[:bucket], slots, plans)
        hidden = self._model.embed(self.resident.token_ids[:bucket])
        for layer in self._model.layers:
            hidden = layer(hidden, ctx)
        return hidden

    def _forward(self, bucket: int, plans: Mapping[str, Any]) -> torch.Tensor:
        return self._model.head(self._layers(bucket, plans))


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
