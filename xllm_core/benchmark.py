"""Measuring the engine in process: throughput of a batch, latency of one. No HTTP, no tokenizer; prompts are random token ids."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xllm_core import __version__
from xllm_core.engine.engine import Engine
from xllm_core.engine.metrics import early_share
from xllm_core.frontend.processor import Processor
from xllm_core.plugins.contracts.observer import StepRecord
from xllm_core.types import EngineRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the engine. Every request generates exactly `output_len` tokens.

    prefix_len: so many of the `input_len` tokens follow from `prefix_seed` alone; they are the same in all requests of all such loads.
    """

    num_prompts: int = 32
    input_len: int = 128
    output_len: int = 128
    temperature: float = 0.0
    seed: int = 0
    prefix_len: int = 0
    prefix_seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One round. Times per request in seconds: ttft_s to the first token, tpot_s per further token. records: the engine's steps."""

    elapsed_s: float
    ttft_s: list[float]
    tpot_s: list[float]
    records: list[StepRecord]


def run_round(processor: Processor, load: Load, *, name: str = "round", show: bool | None = None) -> Result:
    """Submit everything at once and run it to its end."""
    engine = processor.client
    step_log = engine_of(processor).step_log
    chance = random.Random(f"prompts {load.seed}")  # of the number itself -1 and 1 would be one seed
    vocab = engine.info().vocab_size
    params = SamplingParams(max_tokens=load.output_len, temperature=load.temperature, ignore_eos=True)
    shared = random.Random(f"prefix {load.prefix_seed}")
    prefix = tuple(shared.randrange(vocab) for _ in range(load.prefix_len))
    step_log.records.clear()
    started_s = time.perf_counter()
    for i in range(load.num_prompts):
        prompt = prefix + tuple(chance.randrange(vocab) for _ in range(load.input_len - load.prefix_len))
        engine.submit(EngineRequest(f"{name}-{i}", prompt, params, seed=load.seed + i))
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    with tqdm(
        total=load.num_prompts * load.output_len, desc=name, unit="tok", disable=None if show is None else not show
    ) as bar:
        while len(last) < load.num_prompts:
            outputs = engine.poll()
            now_s = time.perf_counter() - started_s
            for output in outputs:
                first.setdefault(output.request_id, now_s)
                if output.finish_reason is not None:
                    last[output.request_id] = now_s
            bar.update(sum(len(output.new_token_ids) for output in outputs))
    elapsed_s = time.perf_counter() - started_s
    tpot = [(last[i] - first[i]) / (load.output_len - 1) for i in last] if load.output_len > 1 else []
    return Result(elapsed_s, list(first.values()), tpot, list(step_log.records))


def report(processor: Processor, load: Load, results: Sequence[Result]) -> dict[str, Any]:
    """The figures of the median round, with every round's throughput beside it.

    early_share: of its steps, planned before the forward of the one before had ended; 0 without overlap. replayed_share: of its
    steps, replayed from recorded graphs.
    """
    ranked = sorted(results, key=lambda r: r.elapsed_s)
    middle = ranked[len(ranked) // 2]
    output_tokens = load.num_prompts * load.output_len
    total_tokens = output_tokens + load.num_prompts * load.input_len
    info = processor.client.info()
    ttft = [t for r in results for t in r.ttft_s]
    tpot = [t for r in results for t in r.tpot_s]
    return {
        "output_tokens_per_s": round(output_tokens / middle.elapsed_s, 2),
        "total_tokens_per_s": round(total_tokens / middle.elapsed_s, 2),
        "elapsed_s": [round(r.elapsed_s, 4) for r in results],
        "ttft_ms": {"p50": _ms(ttft, 0.5), "p99": _ms(ttft, 0.99)},
        "tpot_ms": {"p50": _ms(tpot, 0.5), "p99": _ms(tpot, 0.99)},
        "step_ms": step_split(middle.records),
        "num_steps": len(middle.records),
        "early_share": round(early_share(middle.records), 4),
        "replayed_share": round(sum(r.is_replayed for r in middle.records) / max(1, len(middle.records)), 4),
        "peak_memory_bytes": peak_memory_bytes(),
        "load": asdict(load),
        "model": info.model,
        "dtype": info.dtype,
        "device": info.device,
        "kernels": dict(info.kernels),
        "version": __version__,
        "commit": commit(),
        "plan": info.plan_hash,
    }


def step_split(records: Sequence[StepRecord]) -> dict[str, float]:
    """Mean milliseconds of each part of a step."""
    parts = ("schedule_s", "prepare_s", "forward_s", "sample_s", "emit_s")
    count = max(1, len(records))
    return {part.removesuffix("_s"): round(sum(getattr(r, part) for r in records) / count * 1e3, 4) for part in parts}


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share `q` lies, by nearest rank; 0 for no values."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(q * len(ranked)))] if ranked else 0.0


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def commit() -> str:
    """The checkout's commit, with "+" if it has changes; "" for an installed package."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return ""
    return _git(here, "rev-parse", "--short", "HEAD") + ("+" if _git(here, "status", "--porcelain", "-uno") else "")


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _ms(values: Sequence[float], q: float) -> float:
    return round(quantile(values, q) * 1e3, 3)


def engine_of(processor: Processor) -> Engine:
    """The engine behind a processor of this process."""
    from xllm_core.frontend.client import InProcessClient

    assert isinstance(processor.client, InProcessClient)
    return processor.client.engine
