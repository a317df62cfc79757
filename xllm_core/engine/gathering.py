"""How long an engine that was idle waits for company before it begins: requests that come together are to run together."""

from __future__ import annotations

from xllm_core.engine.engine import Engine
from xllm_core.engine.predictor import seconds_of
from xllm_core.engine.scheduler import Scheduler

_SHARE = 0.02  # of the step that those who are there would take
_MAX_S = 0.02


def patience_s(engine: Engine) -> float:
    """Seconds worth waiting: begun alone, the first of many requests costs the others a step; this is a small part of it.

    The step is taken to last as long as the last one that computed something, and less in proportion where it has fewer tokens to compute: behind
    a long prompt that was computed the same prompt again is short.
    """
    last = next((record for record in reversed(engine.step_log.records) if record.num_tokens), None)
    if last is None:
        return 0.0
    part = min(1.0, num_tokens_waiting(engine.scheduler, last.num_tokens) / last.num_tokens)
    return min(_MAX_S, _SHARE * part * seconds_of(last))


def num_tokens_waiting(scheduler: Scheduler, most: int) -> int:
    """Tokens that sequences in the queue have to compute beside what the device's cache has; counts no further than `most`."""
    num_tokens = 0
    for sequence in scheduler.waiting:
        # What is hashed here is not hashed again when the sequence is admitted.
        found = sequence.found = scheduler.kv.lookup(
            sequence.tokens, salt=sequence.request.salt, use_cache=not sequence.wants_prompt_logprobs, use_store=False,
            previous=sequence.found,
        )  # fmt: skip
        num_tokens += len(sequence.tokens) - found.num_cached_tokens
        if num_tokens >= most:
            return most
    return num_tokens
