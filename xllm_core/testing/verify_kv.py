"""Rows of the matrix that are about where KV is: found again, thrown out, or brought back from a store."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from xllm_core.testing.driving import Tokens, drive, settle
from xllm_core.testing.matrix import NotApplicableError, Outcome, num_wasted
from xllm_core.types import EngineRequest

if TYPE_CHECKING:
    from xllm_core.testing.verify import Verifier

_STEP_TOKENS = 64  # of an engine in a tight pool: the less a step may take, the less a window needs


def prefix_cache(v: Verifier) -> Outcome:
    """Everything twice; the second time the prompts are in the cache."""
    _need_whole_blocks(v)
    with v.engine(max_num_seqs=4, enable_prefix_cache=True) as engine:
        drive(engine, v.requests)
        before = engine.scheduler.kv.stats().hit_tokens
        got = drive(engine, v.requests)
        return Outcome(got, engine.scheduler.kv.stats().hit_tokens - before, "tokens hit")


def preemption(v: Verifier) -> Outcome:
    """A pool so small that sequences are thrown out and computed again."""
    requests, expected = _pressing(v)
    with v.engine(**_tight(v, requests)) as engine:
        got = drive(engine, requests)
        return Outcome(got, engine.scheduler.stats.num_preemptions, "preemptions", expected, requests)


def overlap_preemption(v: Verifier) -> Outcome:
    """Sequences that give way while a row of theirs is computed."""
    requests, expected = _pressing(v)
    with v.overlapped(**_tight(v, requests)) as engine:
        got = drive(engine, requests)
        return Outcome(got, num_wasted(engine), "rows of preempted sequences", expected, requests)


def host_store(v: Verifier) -> Outcome:
    """KV goes to host memory, the device forgets it, and it comes back."""
    return _offloaded(v, "core/host")


def chosen_store(v: Verifier) -> Outcome:
    """The same through the store of a plugin, which `[use] kv_store` names."""
    if v.store in ("", "core/host", "host"):
        raise NotApplicableError("no plugin's store is chosen; install one, and name it: --use kv_store=ID/NAME")
    return _offloaded(v, v.store)


def _offloaded(v: Verifier, store: str) -> Outcome:
    _need_whole_blocks(v)
    with v.engine(max_num_seqs=4, enable_prefix_cache=True, store=store) as engine:
        drive(engine, v.requests)
        settle(engine)
        kv = engine.scheduler.kv
        kv.reset_prefix_cache()
        before = kv.stats().store_tokens  # a store that outlives engines may have had some at once
        return Outcome(drive(engine, v.requests), kv.stats().store_tokens - before, "tokens loaded")


def _tight(v: Verifier, requests: list[EngineRequest]) -> dict[str, int]:
    """Settings under which sequences have to give way: the fewest blocks that hold the longest of them.

    `num_blocks` speaks of the KV group that needs most. Another, of a window, gets fewer in proportion, and may hold the longest only where
    the first has more than it needs; it is then the one that is too small for all.
    """
    settings = {"max_num_seqs": len(requests), "max_num_batched_tokens": _STEP_TOKENS}
    longest = max(len(r.prompt_token_ids) + v.scale.new_tokens - 1 for r in requests)
    num_blocks = _num_tight_blocks(v)
    while v.capacity_tokens(num_blocks=num_blocks, **settings) < longest:
        num_blocks += 1
    return {**settings, "num_blocks": num_blocks}


def _num_tight_blocks(v: Verifier) -> int:
    longest = max(v.scale.lengths) + v.scale.new_tokens
    return max(2, -(-longest // v.plan.block_size))


def _pressing(v: Verifier) -> tuple[list[EngineRequest], Tokens]:
    """Requests that outgrow a tight pool, and what the plain engine says to them.

    Ours do where blocks are small. Where an answer fits into the block that its prompt has begun, nobody asks for another: there, as many
    requests as the pool has blocks, each of which is about to fill its own.
    """
    size, new_tokens = v.plan.block_size, v.scale.new_tokens
    if size <= new_tokens:
        return v.requests, v.baseline
    if size - 1 + new_tokens > v.plan.max_model_len:
        raise NotApplicableError(f"no sequence of this model outgrows a block of {size} tokens")
    assert v.plain is not None
    pool = [token for request in v.requests for token in request.prompt_token_ids] * (1 + size)
    first, requests = v.requests[0], list[EngineRequest]()
    expected: Tokens = {}
    for i in range(_num_tight_blocks(v)):
        prompt = tuple(pool[i : i + size - 1])
        requests.append(replace(first, request_id=f"pressing-{i}", prompt_token_ids=prompt, seed=2000 + i))
        expected |= drive(v.plain.engine, requests[-1:])
    return requests, expected


def _need_whole_blocks(v: Verifier) -> None:
    if max(v.scale.lengths) <= v.plan.block_size:
        raise NotApplicableError(f"no prompt of this model fills a block of {v.plan.block_size} tokens")
