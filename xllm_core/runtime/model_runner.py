"""One forward: gather, plan, embed, layers, head; then logits to tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from xllm_core.plugins.contracts.attention import AttentionKernel
from xllm_core.plugins.contracts.device import AsyncDevice, DeviceBackend
from xllm_core.plugins.contracts.model import ForwardContext, Model
from xllm_core.plugins.contracts.sampling import Sampler
from xllm_core.runtime.graphs import StepGraphs
from xllm_core.runtime.inputs import InputBuffers, StepInputs
from xllm_core.runtime.kv_cache import KVCache
from xllm_core.runtime.logprobs import score_rows, score_targets
from xllm_core.runtime.sampling_state import SamplingState
from xllm_core.types import PendingResult, StepPlan, StepResult, StepTimes, TokenLogprobs

_NO_MODE = nullcontext()
"""For tensors that need none: a replay's, of which nothing is recorded either."""


@dataclass(slots=True)
class RunnerHandle:
    """A forward and what its samples need. hidden: [T, H] after the last layer, kept only where prompt logprobs are asked for."""

    plan: StepPlan
    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    inputs: StepInputs | None = None
    times: StepTimes = field(default_factory=StepTimes)


class ModelRunner:
    """Drives a model over plans. Holds only things bound at start; nothing is looked up by name between two tokens."""

    def __init__(
        self, device: DeviceBackend, model: Model, *, kernels: Mapping[str, AttentionKernel], inputs: InputBuffers, cache: KVCache,
        sampler: Sampler, sampling: SamplingState, copy_blocks: Callable[..., None], graphs: StepGraphs | None = None,
    ) -> None:  # fmt: skip
        self._device = device
        self._model = model
        self._kernels = tuple(kernels.items())
        self._inputs = inputs
        self._cache = cache
        self._sampler = sampler
        self._sampling = sampling
        self._copy_blocks = copy_blocks
        self.graphs = graphs
        self._previous = torch.zeros(0, dtype=torch.int64, device=device.facts().torch_device)
        self._chosen: list[int] | None = []  # None: only the device knows them yet
        self._to_host = device.to_host if isinstance(device, AsyncDevice) else None
        self._ended_s = 0.0  # when the tokens of the last step that was waited for were there

    def forward(self, plan: StepPlan, on_launch: Callable[[], None]) -> RunnerHandle:
        """Run the forward of the plan's rows, if it has any; `apply` came before. on_launch: called when everything is laid out for it."""
        started_s = time.perf_counter()
        handle = RunnerHandle(plan)
        if plan.is_empty:
            handle.times.forward_ended_s = started_s
            return handle
        inputs = self._inputs.gather(plan, self._previous, self._chosen)
        prepared_s = time.perf_counter()
        if self.graphs is None or not self._replay(handle, inputs, self.graphs, on_launch):
            with torch.inference_mode():
                prepared_s = self._compute(handle, inputs, on_launch)
        handle.times.prepare_s = prepared_s - started_s
        handle.times.forward_ended_s = time.perf_counter()
        handle.times.forward_s = handle.times.forward_ended_s - prepared_s
        return handle

    def _replay(
        self, handle: RunnerHandle, inputs: StepInputs, graphs: StepGraphs, on_launch: Callable[[], None]
    ) -> bool:
        """The forward from a graph, or while one is recorded. False: not to be had."""
        plan, num_replays = handle.plan, graphs.stats.num_replays
        if graphs.covers(plan):
            handle.logits = graphs.logits(inputs, on_launch)
            is_done = handle.logits is not None
        elif graphs.covers_ragged(plan):
            hidden = graphs.hidden(inputs, on_launch)
            is_done = hidden is not None
            if hidden is not None and plan.sample_rows:
                last, repeat = self._sampled(plan, inputs)
                with torch.inference_mode():
                    handle.logits = self._logits(hidden[last], repeat)
        else:
            return False
        handle.times.is_replayed = graphs.stats.num_replays > num_replays
        return is_done

    def _compute(self, handle: RunnerHandle, inputs: StepInputs, on_launch: Callable[[], None]) -> float:
        """The forward, op by op. Returns when its kernels' plans were made."""
        plan = handle.plan
        plans = {name: kernel.plan(inputs.layouts[name]) for name, kernel in self._kernels}
        prepared_s = time.perf_counter()
        on_launch()
        hidden = self._model.embed(inputs.token_ids)
        last, repeat = self._sampled(plan, inputs)
        ctx = ForwardContext(inputs.positions, inputs.kv_slots, plans)
        for layer in self._model.layers[:-1]:
            hidden = layer(hidden, ctx)
        if 0 < len(last) < plan.num_tokens and not plan.prompt_logprobs:
            ctx = replace(ctx, wanted=last)
        hidden = self._model.layers[-1](hidden, ctx)
        if plan.sample_rows:
            handle.logits = self._logits(hidden if len(hidden) == len(last) else hidden[last], repeat)
        if plan.prompt_logprobs:
            handle.hidden, handle.inputs = hidden, inputs
        return prepared_s

    def sample(self, handle: RunnerHandle) -> StepResult | PendingResult:
        """Choose a token for every sample of the handle's plan. Pending where nothing but the engine needs the tokens on the host."""
        started_s = time.perf_counter()
        plan, logits = handle.plan, handle.logits
        with torch.inference_mode() if logits is None or logits.is_inference() else _NO_MODE:
            result = self._sample(handle, logits) if logits is not None else self._computed(handle)
            if not plan.sample_rows:
                self._previous, self._chosen = self._previous[:0], []
            if handle.hidden is not None and handle.inputs is not None:
                assert isinstance(result, StepResult)
                result.prompt_logprobs = self._score_prompts(plan, handle.hidden, handle.inputs)
        handle.times.sample_s = time.perf_counter() - started_s
        return result

    def apply(self, plan: StepPlan) -> None:
        """The plan's state changes, in the order `StepPlan` gives: slots, block copies, block tables."""
        sampling = self._sampling
        if plan.released:
            sampling.release(plan.released)
        for state in plan.admitted:
            sampling.admit(state)
        for source, destination, index in plan.forked:
            sampling.fork(source, destination, index)
        copies = plan.kv.copies
        at = 0
        while at < len(copies):  # runs of one group, in order: a later copy may read what an earlier one wrote
            group, end = copies[at][0], at + 1
            written = {copies[at][2]}
            while (
                end < len(copies)
                and copies[end][0] == group
                and copies[end][1] not in written
                and copies[end][2] not in written
            ):
                written.add(copies[end][2])
                end += 1
            sources = torch.tensor([c[1] for c in copies[at:end]], dtype=torch.int64)
            targets = torch.tensor([c[2] for c in copies[at:end]], dtype=torch.int64)
            self._copy_blocks(
                tuple(self._cache.tensors(group)), self._device.to_device(sources), self._device.to_device(targets)
            )
            at = end
        if plan.kv.table_writes:
            self._inputs.write_tables(plan.kv.table_writes)

    def _sampled(self, plan: StepPlan, inputs: StepInputs) -> tuple[torch.Tensor, np.ndarray]:
        """([R] last token of every row that is sampled, [S] which of them each sample is of)."""
        rows, repeat = np.unique(np.array(plan.sample_rows, dtype=np.int64), return_inverse=True)
        return self._device.to_device(torch.from_numpy(inputs.row_starts[1:][rows].astype(np.int64) - 1)), repeat

    def _logits(self, hidden: torch.Tensor, repeat: np.ndarray) -> torch.Tensor:
        """[S, V] float32 of [R, H]. A row sampled for several slots goes through the head once and is repeated."""
        logits: torch.Tensor = self._model.head(hidden)
        if len(hidden) == len(repeat):  # plans list samples in row order, so distinct rows are in order already
            return logits
        return logits[self._device.to_device(torch.from_numpy(repeat))]

    def _sample(self, handle: RunnerHandle, logits: torch.Tensor) -> StepResult | PendingResult:
        sampling, plan = self._sampling, handle.plan
        slots = plan.sample_slots
        counts = sampling.num_logprobs(slots)
        # Processors and samplers write into the logits, and reported logprobs are those of the model.
        raw = logits.clone() if counts is not None else logits
        if sampling.has_processors:
            logits = sampling.process(logits, slots)
        tokens = self._sampler.sample(logits, sampling.batch(slots, plan.sample_positions))
        if self._to_host is not None and counts is None and handle.hidden is None and not sampling.has_processors:
            self._previous, self._chosen = tokens, None
            return PendingResult(partial(self._wait, handle.times, self._to_host(tokens)))
        chosen: list[int] = tokens.tolist()
        self._previous, self._chosen = tokens, chosen
        self._ended_s = time.perf_counter()
        sampling.observe(slots, chosen)
        logprobs: list[list[TokenLogprobs] | None] | None = None
        if counts is not None:
            logprobs = [[s] if s is not None else None for s in score_rows(raw, chosen, counts)]
        return StepResult([(t,) for t in chosen], logprobs)

    def _wait(self, times: StepTimes, arrived: Callable[[], torch.Tensor]) -> StepResult:
        """The engine's thread waits here, step by step."""
        chosen = arrived().tolist()
        ended_s = time.perf_counter()
        calls_s = times.prepare_s + times.forward_s
        started_s = max(times.forward_ended_s - calls_s, self._ended_s)  # before, the device was busy with another step
        times.sample_s = max(times.sample_s, ended_s - started_s - calls_s)
        self._ended_s = ended_s
        return StepResult([(t,) for t in chosen])

    def _computed(self, handle: RunnerHandle) -> StepResult | PendingResult:
        """Of a step that samples nothing: its blocks are read and saved once it counts as done, so that the device must have done it."""
        if self._to_host is None or handle.plan.is_empty or handle.hidden is not None:
            return StepResult(())
        return PendingResult(partial(self._wait, handle.times, self._to_host(self._previous[:0])))

    def _score_prompts(
        self, plan: StepPlan, hidden: torch.Tensor, inputs: StepInputs
    ) -> Sequence[Sequence[TokenLogprobs]]:
        scores: list[list[TokenLogprobs]] = []
        at = 0
        for row, count in plan.prompt_logprobs:
            first, end = int(inputs.row_starts[row]), int(inputs.row_starts[row + 1])
            targets = plan.prompt_targets[at : at + end - first]
            at += end - first
            scores.append(score_targets(self._model.head, hidden[first:end], targets, count))
        return scores
