"""Which tokens the next forward computes, for whom, and what becomes of the tokens that come back.

One idea: every sequence has a gap between the tokens it knows and the tokens whose KV exists; a step closes part of it, within the
token budget and the block pool. Chunks, decode, prefix hits and forks differ only in the size of the gap.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from xllm_core.engine.flight import Flight
from xllm_core.engine.limits import AdmissionLimits
from xllm_core.engine.predictor import StepShape, StepTimes
from xllm_core.engine.sequence import Sequence, Status
from xllm_core.errors import InvalidRequestError, PluginError, QueueFullError
from xllm_core.kv.manager import KVManager, Lookup, SequenceKV
from xllm_core.plugins.contracts.scheduler import SchedulerPolicy, SequenceView
from xllm_core.types import EngineRequest, FinishReason, StepPlan, StepResult, TokenOutput


@dataclass(slots=True)
class SchedulerLimits:
    """Bounds of a step and of the queue. max_chunk_tokens: tokens of one sequence in one step, 0 for no bound of its own.

    max_store_wait_s: how long a store may answer "later" before the prefix is computed instead.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_chunk_tokens: int = 0
    max_waiting: int = 10_000
    max_model_len: int = 2048
    max_store_wait_s: float = 5.0


@dataclass(slots=True)
class SchedulerStats:
    """Counts since start: steps planned; sequences preempted; rows that computed a part of their gap; siblings forked; sequences that
    went aside for a store, and those that gave up on it; sequences aborted and ended; rows computed in vain, because their sequence had
    ended, was aborted or preempted while the step ran (a row that is sampled for several counts for each).
    """

    num_steps: int = 0
    num_preemptions: int = 0
    num_chunked: int = 0
    num_forks: int = 0
    num_waited_for_kv: int = 0
    num_store_timeouts: int = 0
    num_aborted: int = 0
    num_finished: int = 0
    num_wasted_rows: int = 0


@dataclass(slots=True)
class SchedulerEvents:
    """(id, monotonic seconds) of requests that left the queue for the first time, and ids of those that lost their place again."""

    admitted: list[tuple[str, float]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)


_NOTHING = TokenOutput("", 0, ())


class Scheduler:
    """Queues, slots and budgets of one engine. Imports no torch; called by one thread."""

    def __init__(self, kv: KVManager, policy: SchedulerPolicy, limits: SchedulerLimits) -> None:
        self.kv = kv
        self.policy = policy
        self.limits = limits
        self.admission = AdmissionLimits(
            limits.max_model_len, kv.capacity_tokens, limits.max_num_seqs, uses_priority=policy.uses_priority
        )
        self.stats = SchedulerStats()
        self.events: SchedulerEvents | None = None  # kept only where somebody takes them
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.parked: list[Sequence] = []  # WAITING_KV
        self._requests: dict[str, list[Sequence]] = {}
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_seats = 0
        self._released: list[int] = []
        self._in_flight: deque[Flight] = deque()
        self._num_arrivals = 0
        self.step_times = StepTimes() if getattr(policy, "uses_step_times", False) else None
        self._step = 0
        self._is_order_stale = False
        self._is_running_unsorted = False
        self._over_already: list[TokenOutput] = []

    # ---- requests in and out -------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raises RequestError and leaves no trace if it can never run or too many wait."""
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use; choose another")
        if len(self.waiting) + len(self.parked) >= self.limits.max_waiting:
            raise QueueFullError(
                f"{len(self.waiting) + len(self.parked)} sequences wait already ([scheduler] max_waiting = {self.limits.max_waiting});"
                " try again later"
            )
        max_len = self.admission.check(request)
        num_roots = len(request.emitted) or 1
        order = self._num_arrivals
        self._num_arrivals += 1
        roots = [
            Sequence(request, i, arrival_order=order, max_len=max_len, num_siblings=request.params.n - num_roots)
            for i in range(num_roots)
        ]
        over = [output for root in roots if (output := root.last_word()) is not None]
        if len(over) == len(roots):
            raise InvalidRequestError(
                f"request {request.request_id!r}: the emitted tokens end every sequence already; there is nothing to resume",
                param="emitted",
            )
        self._over_already += over
        ended = {output.index for output in over}
        self._requests[request.request_id] = [root for root in roots if root.index not in ended]
        self.waiting.extend(self._requests[request.request_id])
        self._is_order_stale = True

    def abort(self, request_id: str, index: int | None = None) -> int:
        """Drop a request, or one sequence of it; unknown ids are fine (it may just have finished). Returns sequences dropped."""
        dropped = [s for s in self._requests.get(request_id, ()) if index is None or s.index == index]
        self._over_already = [
            o for o in self._over_already if o.request_id != request_id or index not in (None, o.index)
        ]
        for sequence in dropped:
            if index is not None and sequence.num_siblings:
                raise InvalidRequestError(
                    f"sequence {index} of {request_id!r} has not forked yet; abort the request as a whole"
                )
            self._leave(sequence)
            self._forget(sequence)
        if dropped:
            self.running = [s for s in self.running if s.status is Status.RUNNING]
        self.stats.num_aborted += len(dropped)
        return len(dropped)

    @property
    def can_schedule(self) -> bool:
        """Whether another plan could have anything in it, be it only slots to give back."""
        return bool(self.running or self.waiting or self.parked or self._released)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished or a plan is in flight."""
        return self.can_schedule or bool(self._in_flight)

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._requests)

    def live_sequences(self) -> dict[str, list[Sequence]]:
        """Unfinished sequences by request; for reports and tests, not to be changed."""
        return self._requests

    # ---- a step ---------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Choose how many tokens each sequence computes in the next forward; the plan may be empty."""
        plan = StepPlan(step=self._step)
        self._step += 1
        plan.released, self._released = self._released, []
        flight = Flight(plan)
        num_preempted = self.stats.num_preemptions
        self._plan_running(flight)
        # Preempting and admitting in one step would hand the freed blocks to a newcomer, and thrash.
        if self.stats.num_preemptions == num_preempted:
            self._unpark()
            self._admit(flight)
        plan.kv = self.kv.take_changes()
        # A preempted sequence gives its slot back in the very plan that no longer holds a row of it.
        plan.released += self._released
        self._released = []
        self._in_flight.append(flight)
        self.stats.num_steps += 1
        return plan

    def _plan_running(self, flight: Flight) -> None:
        """Every running sequence. Those with one token to go, which are nearly all, are gathered and written at once."""
        if self._is_running_unsorted:
            self._sort_running()
        plan, budget, running = flight.plan, self.limits.max_num_batched_tokens, self.running
        commits, i = flight.commits, 0
        decoding: list[Sequence] = []
        while i < len(running) and plan.num_tokens + len(decoding) < budget:
            sequence = running[i]
            num_known = len(sequence.tokens) + sequence.num_pending
            end = sequence.num_computed + 1
            if end < num_known:
                left = budget - plan.num_tokens - len(decoding)
                end = sequence.num_computed + self._chunk(sequence, num_known - end + 1, left)
            elif num_known >= sequence.max_len:
                end = 0  # its last token is in flight
            if end <= sequence.num_computed or sequence.sample_step == plan.step:
                i += 1  # nothing to compute now; or a twin forked a moment ago, whose turn is the next step
                continue
            kv = sequence.kv
            assert kv is not None
            if end > kv.capacity_tokens and not self._make_room(sequence, end, i, plan.step):
                i += sequence.kv is kv  # it waits; or it gave way itself, and running[i] is the next one
                continue
            i += 1
            if (
                end < num_known
                or end > sequence.num_computed + 1
                or sequence.wants_prompt_logprobs
                or sequence.num_siblings
            ):
                self._add_row(flight, sequence, end - sequence.num_computed)
                continue
            sequence.num_computed = end
            decoding.append(sequence)
            if end >= kv.next_commit_tokens:
                commits.append((sequence, kv, end))
        flight.add_decoding(decoding)

    def _add_row(self, flight: Flight, sequence: Sequence, want: int) -> None:
        if flight.add_row(sequence, want) and sequence.num_siblings:
            self._fork(flight, sequence)

    def _make_room(self, sequence: Sequence, end: int, num_planned: int, step: int) -> bool:
        """Reserve room up to `end`, preempting whom the policy names; False if `sequence` had to go, or has to wait a step.

        A victim that computes in this very step cannot go now: `sequence` waits, and in the next step the more important come first.
        """
        assert sequence.kv is not None
        while not self.kv.reserve(sequence.kv, end):
            first = self.policy.victims([self._view(s) for s in self.running], time.monotonic())[0]
            victim = self.running[first]
            if first < num_planned or victim.sample_step == step:
                self._is_running_unsorted = True
                return False
            if victim is sequence and self.kv.stats().held_blocks:
                return False  # a transfer is about to give blocks back; to start again from nothing would gain none
            del self.running[first]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _sort_running(self) -> None:
        """The most important first, so that whoever has to give way comes last and is not planned yet."""
        order = self.policy.victims([self._view(s) for s in self.running], time.monotonic())
        self.running = [self.running[i] for i in reversed(order)]
        self._is_running_unsorted = False

    def _preempt(self, victim: Sequence) -> None:
        # Blocks on their way to a store are not free, and free ones are what this is for: with them held, one preemption would
        # bring the next, down to the sequence that asked.
        self._leave(victim, save=False)
        victim.status = Status.WAITING
        victim.num_computed = victim.num_pending = 0
        victim.sample_step = -2
        victim.num_preemptions += 1
        self.stats.num_preemptions += 1
        if self.events is not None:
            self.events.preempted.append(victim.request_id)
        self.waiting.appendleft(victim)
        self._is_order_stale = True

    def _view(self, sequence: Sequence) -> SequenceView:
        view = sequence.view()
        if self.step_times is None or self.step_times.predictor is None:
            return view
        num_tokens = min(view.todo_tokens, self.limits.max_num_batched_tokens)
        shape = StepShape.of((sequence.num_computed,), (num_tokens,), num_tokens)
        return replace(view, predicted_step_s=self.step_times.predict(shape))

    def _chunk(self, sequence: Sequence, todo: int, budget: int) -> int:
        """Tokens of a gap wider than one to compute now; 0 leaves the sequence for a later step."""
        if self.limits.max_chunk_tokens:
            budget = min(budget, self.limits.max_chunk_tokens)
        want = self.policy.chunk(self._view(sequence), budget)
        if not 0 <= want <= min(todo, budget):
            raise PluginError(
                f"scheduling policy {type(self.policy).__name__} wants {want} tokens of a sequence that has {todo} to go and a budget of"
                f" {budget}; it must choose from 0 to the smaller of the two"
            )
        self.stats.num_chunked += 0 < want < todo
        return want

    # ---- admission --------------------------------------------------------------------------------------------------------

    def _admit(self, flight: Flight) -> None:
        plan = flight.plan
        budget = self.limits.max_num_batched_tokens
        if self.waiting and (self._is_order_stale or not self.policy.is_static):
            order = self.policy.order([self._view(s) for s in self.waiting], time.monotonic())
            waiting = list(self.waiting)
            self.waiting = deque(waiting[i] for i in order)
            self._is_order_stale = False
        # The head is never skipped: a big request must not starve behind small ones.
        while self.waiting and plan.num_tokens < budget:
            sequence = self.waiting[0]
            if self._num_seats + sequence.num_seats > self.limits.max_num_seqs:
                break
            found = sequence.found = self.kv.lookup(
                sequence.tokens, salt=sequence.request.salt, use_cache=not sequence.wants_prompt_logprobs,
                use_store=sequence.can_use_store, previous=sequence.found,
            )  # fmt: skip
            if found.is_later or found.num_store_blocks:
                if not self._park(sequence, found):
                    break
                continue
            want = self._chunk_new(sequence, found, budget - plan.num_tokens)
            slot = self._free_slots[-1]
            kv = self.kv.admit(found, sequence.tokens, found.num_cached_tokens + want, slot) if want else None
            if kv is None:
                break
            self._enter(plan, sequence, kv, found.num_cached_tokens)
            self._add_row(flight, sequence, want)

    def _chunk_new(self, sequence: Sequence, found: Lookup, budget: int) -> int:
        sequence.num_computed = found.num_cached_tokens
        todo = len(sequence.tokens) - sequence.num_computed
        want = self._chunk(sequence, todo, budget)
        sequence.num_computed = 0
        return want

    def _enter(self, plan: StepPlan, sequence: Sequence, kv: SequenceKV, num_cached: int) -> None:
        self.waiting.popleft()
        sequence.status, sequence.kv, sequence.slot = Status.RUNNING, kv, self._free_slots.pop()
        sequence.num_computed, sequence.parked_s = num_cached, None
        sequence.num_cached = max(sequence.num_cached, min(num_cached, sequence.num_prompt))
        self._num_seats += sequence.num_seats
        if self.events is not None and sequence.index == 0 and not sequence.num_preemptions:
            self.events.admitted.append((sequence.request_id, time.monotonic()))
        self.running.append(sequence)
        plan.admitted.append(sequence.slot_state())

    def _park(self, sequence: Sequence, found: Lookup) -> bool:
        """Set aside a sequence whose KV a store may bring; False if there is no room for it now."""
        if not found.is_later:
            kv = self.kv.load(found, sequence.tokens)
            if kv is None:
                return False
            sequence.kv = kv
        self.waiting.popleft()
        sequence.status = Status.WAITING_KV
        self.parked.append(sequence)
        if sequence.parked_s is None:
            sequence.parked_s = time.monotonic()
            self.stats.num_waited_for_kv += 1
        return True

    def _unpark(self) -> None:
        """Sequences whose load ended, or whose store should be asked again, go back to the queue in their old place.

        What was loaded is published by then, so the ordinary admission finds it as a prefix hit.
        """
        still, now_s = [], time.monotonic()
        for sequence in self.parked:
            if sequence.kv is not None:
                if sequence.kv.ticket is not None:
                    still.append(sequence)
                    continue
                self.kv.release(sequence.kv)
                sequence.kv = None
                sequence.can_use_store = False
            elif sequence.parked_s is not None and now_s - sequence.parked_s > self.limits.max_store_wait_s:
                sequence.can_use_store = (
                    False  # a store that never answers costs this much, then the prefix is computed
                )
                self.stats.num_store_timeouts += 1
            sequence.status = Status.WAITING
            self.waiting.appendleft(sequence)
            self._is_order_stale = True
        self.parked = still

    def _fork(self, flight: Flight, root: Sequence) -> None:
        """The prompt is computed once; each sibling samples its own first token from the same logits and goes its own way."""
        assert root.kv is not None
        row = len(flight.plan.slots) - 1
        for index in range(1, root.num_siblings + 1):
            slot = self._free_slots.pop()
            kv = self.kv.fork(root.kv, slot)
            twin = root.fork(index, slot, kv)
            flight.plan.forked.append((root.slot, slot, index))
            flight.add_sample(twin, kv, row)
            self._requests[root.request_id].append(twin)
            self.running.append(twin)
            self.stats.num_forks += 1
        root.num_siblings = 0

    # ---- results ----------------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[TokenOutput]:
        """Take the result of the oldest plan in flight: publish blocks, append tokens, end sequences. Returns what is new."""
        flight = self._in_flight.popleft()
        for ticket, has_succeeded in result.finished_transfers:
            self.kv.finish_transfer(ticket, has_succeeded)
        for sequence, kv, num_computed in flight.commits:
            if sequence.kv is kv:
                self.kv.commit(kv, sequence.tokens, num_computed)
        outputs, self._over_already = self._over_already, []
        if flight.scored:
            self._score_prompts(flight, result, outputs)
        num_wasted = sum(sequence.kv is not kv for sequence, kv in flight.partial)
        num_finished = 0
        for (sequence, kv), accepted in zip(flight.samples, result.token_ids, strict=True):
            if sequence.kv is not kv:
                outputs.append(_NOTHING)  # finished, aborted or preempted while the step ran
                num_wasted += 1
                continue
            sequence.num_pending -= 1
            new, reason, stop = accepted, None, None
            if (
                len(accepted) == 1
                and accepted[0] not in sequence.stop_ids
                and len(sequence.tokens) + 1 < sequence.max_len
            ):
                sequence.tokens.append(accepted[0])
            else:
                new, reason, stop = self._append(sequence, accepted)
            outputs.append(TokenOutput(sequence.request_id, sequence.index, new, reason, stop, sequence.num_cached))
            if reason is not None:
                self._leave(sequence)
                self._forget(sequence)
                num_finished += 1
        if result.logprobs is not None:
            for output, scores in zip(outputs[len(outputs) - len(flight.samples) :], result.logprobs, strict=True):
                if scores is not None and output is not _NOTHING:
                    output.logprobs = scores[: len(output.new_token_ids)]
        if num_finished:
            self.running = [s for s in self.running if s.status is Status.RUNNING]
            self.stats.num_finished += num_finished
        self.stats.num_wasted_rows += num_wasted
        return [output for output in outputs if output is not _NOTHING]

    @staticmethod
    def _append(sequence: Sequence, new: Seq[int]) -> tuple[Seq[int], FinishReason | None, int | None]:
        """Add accepted tokens up to the one that ends the sequence. Returns (tokens kept, reason, stop token)."""
        tokens, stop_ids, max_len = sequence.tokens, sequence.stop_ids, sequence.max_len
        for i, token in enumerate(new):
            tokens.append(token)
            if token in stop_ids:
                return new[: i + 1], "stop", token
            if len(tokens) >= max_len:
                return new[: i + 1], "length", None
        return new, None, None

    def _score_prompts(self, flight: Flight, result: StepResult, outputs: list[TokenOutput]) -> None:
        for (sequence, kv, start), scores in zip(flight.scored, result.prompt_logprobs, strict=True):
            if sequence.kv is not kv:
                continue
            new = scores[max(0, sequence.num_scored - start) : max(0, sequence.num_prompt - 1 - start)]
            sequence.num_scored += len(new)
            if new:
                outputs.append(
                    TokenOutput(
                        sequence.request_id,
                        sequence.index,
                        (),
                        num_cached_tokens=sequence.num_cached,
                        prompt_logprobs=new,
                    )
                )

    # ---- leaving ------------------------------------------------------------------------------------------------------------

    def _leave(self, sequence: Sequence, *, save: bool = True) -> None:
        """Give back blocks, slot and seats; the caller takes it out of `running`. save: offer its blocks to the store."""
        if sequence.kv is not None:
            self.kv.release(sequence.kv, save=save)
            sequence.kv = None
        if sequence.slot >= 0:
            self._released.append(sequence.slot)
            self._free_slots.append(sequence.slot)
            self._num_seats -= sequence.num_seats
            sequence.slot = -1
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.WAITING_KV:
            self.parked.remove(sequence)
        sequence.status = Status.FINISHED

    def _forget(self, sequence: Sequence) -> None:
        request_id = sequence.request_id
        left = [s for s in self._requests[request_id] if s is not sequence]
        if left:
            self._requests[request_id] = left
        else:
            del self._requests[request_id]
