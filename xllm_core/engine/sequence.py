"""A sequence as the scheduler sees it: tokens known, tokens computed, and the gap between them."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from xllm_core.plugins.contracts.scheduler import SequenceView
from xllm_core.types import EngineRequest, SlotState, TokenOutput

if TYPE_CHECKING:
    from xllm_core.kv.manager import Lookup, SequenceKV


class Status(enum.Enum):
    """Where a sequence is. WAITING_KV: a store brings its blocks, or has yet to say whether it can; others pass it."""

    WAITING = "waiting"
    WAITING_KV = "waiting_kv"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sequence of a request.

    tokens: prompt, then output. num_computed: leading tokens whose KV exists or is being computed by a step in flight.
    num_pending: samples in flight whose tokens are not in `tokens` yet. num_siblings: sequences to fork off at the first sample.
    sample_step, sample_index: where its last token was sampled, so that the next step can point at it (`prev_rows`).
    """

    __slots__ = (
        "arrival_order", "can_use_store", "found", "index", "kv", "max_len", "num_cached", "num_computed", "num_pending", "num_preemptions",
        "num_prompt", "num_scored", "num_siblings", "parked_s", "request",
        "request_id", "sample_index", "sample_step", "slot", "status", "stop_ids", "tokens",
        "wants_prompt_logprobs",
    )  # fmt: skip

    def __init__(
        self, request: EngineRequest, index: int, *, arrival_order: int, max_len: int, num_siblings: int
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.index = index
        self.arrival_order = arrival_order
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        if request.emitted:
            self.tokens += request.emitted[index]
        self.max_len = max_len
        stop_ids = frozenset(request.params.stop_token_ids)
        self.stop_ids = stop_ids if request.params.ignore_eos else stop_ids | request.eos_token_ids
        self.num_siblings = num_siblings
        self.status = Status.WAITING
        self.kv: SequenceKV | None = None
        self.slot = -1
        self.num_computed = 0
        self.num_pending = 0
        self.num_preemptions = 0
        self.num_cached = 0
        self.num_scored = 0  # prompt positions whose logprobs went out; they are not sent again after a preemption
        self.wants_prompt_logprobs = request.params.prompt_logprobs is not None and index == 0
        self.found: Lookup | None = None  # the last look-up, so that waiting does not hash the prompt again and again
        self.can_use_store = True
        self.parked_s: float | None = None  # when it first went aside for a store
        self.sample_step = -2  # before any step, and not just before the first
        self.sample_index = -1

    @property
    def num_seats(self) -> int:
        """Slots it takes now or will take when its siblings fork off."""
        return 1 + self.num_siblings

    def fork(self, index: int, slot: int, kv: SequenceKV) -> Sequence:
        """A sibling that shares everything computed so far. Called when the step that samples the first token is planned."""
        twin = Sequence(self.request, index, arrival_order=self.arrival_order, max_len=self.max_len, num_siblings=0)
        twin.status, twin.slot, twin.kv = Status.RUNNING, slot, kv
        twin.num_computed, twin.num_cached = self.num_computed, self.num_cached
        twin.can_use_store = self.can_use_store
        return twin

    def last_word(self) -> TokenOutput | None:
        """For a resumed sequence that had ended where it came from: what it ended with. Its siblings may go on."""
        if not self.request.emitted or not self.request.emitted[self.index]:
            return None
        if self.tokens[-1] in self.stop_ids:
            return TokenOutput(self.request_id, self.index, (), "stop", self.tokens[-1])
        return TokenOutput(self.request_id, self.index, (), "length") if len(self.tokens) >= self.max_len else None

    def slot_state(self) -> SlotState:
        """What the worker needs to sample for it from here on."""
        request = self.request
        return SlotState(
            slot=self.slot, index=self.index, seed=request.seed, params=request.params, eos_token_ids=request.eos_token_ids,
            prompt_token_ids=self.tokens[: self.num_prompt], output_token_ids=self.tokens[self.num_prompt :],
        )  # fmt: skip

    def view(self) -> SequenceView:
        """A snapshot for a policy."""
        request = self.request
        return SequenceView(
            request_id=request.request_id, arrival_order=self.arrival_order, arrival_s=request.arrival_s, priority=request.priority,
            is_offline=request.is_offline, prompt_tokens=self.num_prompt, output_tokens=len(self.tokens) - self.num_prompt,
            max_tokens=self.max_len - self.num_prompt, todo_tokens=len(self.tokens) + self.num_pending - self.num_computed,
            num_preemptions=self.num_preemptions,
        )  # fmt: skip
