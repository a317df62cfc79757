"""What does a step cost on the host, beside the forward and choosing tokens?

Method: the real engine, scheduler, KV manager and model runner with a model of no layers, whose forward costs nothing and whose
sampler always says 1. N sequences decode together from 128 tokens to 256; a step's bookkeeping is schedule + gather (prepare) + update and emit.
Reported over the steps in which all N decode: the median, and the mean, which includes the steps where all of them need a
new block at once (every 16th here, since all prompts are equally long: the worst case). Garbage collection is on.

Not measured: tokenising, detokenising, HTTP, the forward, logits to token.

    python -m benchmarks.host_bookkeeping | tail -1 | jq .
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.machine import conditions
from xllm_core.engine.engine import Engine
from xllm_core.engine.executor import InProcessExecutor
from xllm_core.engine.policy import Fcfs
from xllm_core.engine.scheduler import Scheduler, SchedulerLimits
from xllm_core.kv.manager import KVManager
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec, KVTensorSpec
from xllm_core.plugins.contracts.model import Layer
from xllm_core.reference.device import ReferenceDevice
from xllm_core.reference.ops import BlockCopy
from xllm_core.runtime.worker import Worker, WorkerParts
from xllm_core.types import EngineRequest, SamplingParams

VOCAB = 8


class NullLayer:
    """Nothing between embedding and logits."""

    def __call__(self, h: torch.Tensor, ctx: Any) -> torch.Tensor:
        """h: [T, 1]; returns it."""
        return h


class NullModel:
    """One layer that does nothing; the runner asks the last one for less than the others."""

    layers: Sequence[Layer] = (NullLayer(),)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T, 1]."""
        return token_ids.unsqueeze(-1)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """[N, 8], token 1 is the likeliest."""
        logits = torch.zeros(len(h), VOCAB)
        logits[:, 1] = 1
        return logits


class NullSampler:
    """Always 1, so that choosing costs nothing either."""

    def sample(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        """[S] int64."""
        return torch.ones(len(logits), dtype=torch.int64)


class NullKernel:
    """Plans nothing: planning is the kernel's own cost."""

    def plan(self, batch: Any) -> None:
        """Nothing."""

    def run(self, q: Any, kv: Any, plan: Any, out: Any) -> None:
        """Never called: there are no layers."""


def measure(num_sequences: int, *, input_len: int = 128, output_len: int = 128) -> dict[str, float]:
    """Milliseconds per step, by part."""
    size = 16
    group = KVGroupSpec("full", "full", (0,), (KVTensorSpec("k", (1,), "float32"),))
    blocks = num_sequences * -(-(input_len + output_len) // size)
    geometry = KVGeometry((group,), size, (blocks,), (size * 4,), "BSGD", "null")
    device = ReferenceDevice(0)
    parts = WorkerParts(
        device=device, model=NullModel(), kernels={"full": NullKernel()}, copy_blocks=BlockCopy(device), sampler=NullSampler(), processors=[],
        bind_kv=lambda cache: None,
    )  # fmt: skip
    context = input_len + output_len
    limits = SchedulerLimits(max_num_seqs=num_sequences, max_num_batched_tokens=8192, max_model_len=context)
    scheduler = Scheduler(KVManager(geometry, max_chunk_tokens=8192), Fcfs(), limits)
    worker = Worker(parts, geometry, num_slots=num_sequences, max_model_len=context)
    engine = Engine(scheduler, InProcessExecutor(worker), vocab_size=VOCAB)
    for i in range(num_sequences):
        params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
        engine.submit(EngineRequest(f"r{i}", [(i * 7 + j) % VOCAB for j in range(input_len)], params, seed=i))
    while engine.has_work:
        engine.step()
    records = [r for r in engine.step_log.records if r.num_rows == r.num_tokens == num_sequences]
    parts_ms = {
        part: _median([getattr(r, f"{part}_s") * 1e3 for r in records]) for part in ("schedule", "prepare", "emit")
    }
    totals = [(r.schedule_s + r.prepare_s + r.emit_s) * 1e3 for r in records]
    return {
        **parts_ms,
        "median": _median(totals),
        "mean": round(sum(totals) / len(totals), 4),
        "num_steps": len(records),
    }


def _median(values: list[float]) -> float:
    return round(sorted(values)[len(values) // 2], 4)


def run() -> dict[str, Any]:
    """Both sizes of the target."""
    return {"conditions": conditions(), "32": measure(32), "1024": measure(1024)}


if __name__ == "__main__":
    print(json.dumps(run()))
