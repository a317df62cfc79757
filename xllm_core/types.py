"""The words that every room shares: what is asked, what one step does, what comes back.

Plain data, no torch. Lists inside a `StepPlan` are columns: entry i of each belongs to row i of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Names and meanings follow vLLM's class of the same name.

    Checked by `xllm_core.frontend.validation`, which knows vocabulary and limits; construction only stores.

    n: sequences per prompt. max_tokens: None means "as many as the context leaves".
    temperature: 0 is greedy, else 1e-5 to 2. top_k: 0 or -1 is off. top_p: (0, 1]. min_p: [0, 1], relative to the likeliest token.
    repetition_penalty: 1e-3 to 1e3, over prompt and output. frequency_penalty, presence_penalty: -2 to 2, over output.
    seed: int64; None draws one per request, so that a replay of that request still repeats it.
    stop: strings that end the text, found by the front side; stop_token_ids: found by the engine.
    logprobs: number of likeliest tokens to report beside the chosen one; None is off. prompt_logprobs: the same for the prompt.
    logit_bias: added to the raw logits of these token ids. allowed_token_ids: everything else is impossible.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as the engine takes it: tokens in, no text.

    emitted: per sequence, tokens that an earlier engine has already given out; penalties, limits, stops and noise continue there.
        Empty, or one entry per sequence (`params.n`).
    seed: always set; pure noise is drawn from (seed, sequence index, absolute position).
    eos_token_ids: what ends a sequence unless `params.ignore_eos`.
    priority: lower is served first, read by policies that care. salt: separates prefix caches of tenants.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    emitted: Sequence[Sequence[int]] = ()
    priority: int = 0
    arrival_s: float = 0.0
    is_offline: bool = False
    salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, before temperature and filters.

    chosen: of the token that stands there. rank: 1 for the likeliest. top: (token id, logprob), likeliest first.
    """

    token_id: int
    chosen: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class TokenOutput(msgspec.Struct, gc=False):
    """What one step brought to one sequence; the engine's only product. Made per token, so cheap, and no work for the collector.

    new_token_ids: 0..k+1 tokens. finish_reason: set exactly once, on the last output of a sequence.
    stop_reason: the token id that ended it, if one did. error: text for `finish_reason == "error"`.
    prompt_logprobs: entries for consecutive prompt positions as chunks are computed; the first prompt token has none.
    """

    request_id: str
    index: int
    new_token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    error: str | None = None


@dataclass(slots=True)
class SlotState:
    """A sequence that enters a slot: all that the worker must know to sample for it, now or after a preemption.

    prompt_token_ids and output_token_ids are read only; penalties count them once, here.
    """

    slot: int
    index: int
    seed: int
    params: SamplingParams
    eos_token_ids: frozenset[int]
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(slots=True)
class KVTransfer:
    """Blocks that go to a store or come from one. Device blocks are leased until the ticket is reported finished.

    keys: storage key per block of tokens. block_ids[g][i]: device block of group g for keys[i], -1 where that group has none.
    One key covers the groups of kind "full", all together, or one group of another kind. A save names all that its keys cover; a load may
    name fewer of the full ones, where the device has the others.
    """

    ticket: int
    is_load: bool
    keys: Sequence[bytes]
    block_ids: Sequence[Sequence[int]]


@dataclass(slots=True)
class KVChanges:
    """What the KV manager did since it was last asked; the worker applies it in this order before the forward.

    copies: (group, source block, destination block), copy on write. table_writes: (group, slot, first index, block ids);
    a block id of -1 is a hole (a block that left a sliding window). transfers: to start, in order.
    """

    copies: list[tuple[int, int, int]] = field(default_factory=list)
    table_writes: list[tuple[int, int, int, list[int]]] = field(default_factory=list)
    transfers: list[KVTransfer] = field(default_factory=list)


@dataclass(slots=True)
class StepPlan:
    """Everything one forward does. Plain data that could cross a process; may be empty (`is_empty`).

    Worker state, applied in this order: `released` slots, `admitted` sequences, `forked` (source slot, destination slot, index), `kv`.

    Rows (columns of equal length): `slots[i]` is the sequence's fixed row in the worker's buffers, `starts[i]` the first
    position computed, `lengths[i]` how many. `prev_rows[i]` >= 0 says that the row's one input token is what sample number
    `prev_rows[i]` of the previous step chose, which only the worker may know yet; -1 takes the next `lengths[i]` entries of
    `token_ids`.

    Samples: `sample_rows[j]` is the row whose last token's logits are sampled for slot `sample_slots[j]`; a row may
    be sampled for several slots (n > 1). `sample_positions[j]` is the absolute position of the token chosen.
    `prompt_logprobs`: (row, top count) of the rows that report logprobs for each position they compute, given by `prompt_targets`:
    the known next token of each position of those rows, flat.
    """

    step: int
    released: list[int] = field(default_factory=list)
    admitted: list[SlotState] = field(default_factory=list)
    forked: list[tuple[int, int, int]] = field(default_factory=list)
    kv: KVChanges = field(default_factory=KVChanges)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prev_rows: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)
    sample_slots: list[int] = field(default_factory=list)
    sample_positions: list[int] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int]] = field(default_factory=list)
    prompt_targets: list[int] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        """No row to compute; the worker still applies the state changes."""
        return not self.slots


@dataclass(slots=True)
class StepResult:
    """What came back from the worker for one plan.

    token_ids[j]: 0..k+1 tokens accepted for sample j. logprobs[j]: one entry per token, None where nobody asked.
    prompt_logprobs: one list per entry of `plan.prompt_logprobs`. finished_transfers: (ticket, succeeded).
    """

    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[TokenLogprobs] | None] | None = None
    prompt_logprobs: Sequence[Sequence[TokenLogprobs]] = ()
    finished_transfers: Sequence[tuple[int, bool]] = ()


@dataclass(slots=True)
class PendingResult:
    """A `StepResult` whose tokens the device still computes. wait: for them, on any thread, once. finished_transfers: as there."""

    wait: Callable[[], StepResult]
    finished_transfers: Sequence[tuple[int, bool]] = ()

    def result(self) -> StepResult:
        """Wait; raises what the device's work raised."""
        result = self.wait()
        result.finished_transfers = self.finished_transfers
        return result


@dataclass(slots=True)
class StepTimes:
    """Seconds of one step on the worker: gathering inputs and planning kernels, the layers and the head, logits to tokens.

    forward_ended_s: `time.perf_counter` after the last call of the forward (a device may still be busy with it). Where tokens are waited for later
    (`PendingResult`), sample_s goes on until the engine had them, but for the time in which it had not yet those of the step before.
    is_replayed: the forward came from a recorded graph.
    """

    prepare_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    forward_ended_s: float = 0.0
    is_replayed: bool = False


@dataclass(slots=True)
class Logprob:
    """One candidate token of a position, as users see it."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One sequence of an answer. `text` never ends inside a character. finish_reason is None while it runs.

    logprobs: one entry per token of `token_ids`; None for tokens that an earlier engine gave out (a resumed request), which
    `cumulative_logprob` leaves out as well.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob] | None] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, monotonic seconds: taken in, first token seen, finished."""

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt, whole or so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None
