"""A plan while it is being written, and what it was made of until its result is in."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm_core.engine.sequence import Sequence
from xllm_core.kv.manager import SequenceKV
from xllm_core.types import StepPlan


@dataclass(slots=True)
class Flight:
    """One step under way. A sequence whose `kv` is another by then has left or was preempted; its result is dropped.

    commits: (sequence, kv, tokens computed) of rows that complete a block. samples: per sample of the plan. partial: of rows that
    sample nothing. scored: (sequence, kv, first position) per entry of `plan.prompt_logprobs`.
    """

    plan: StepPlan
    commits: list[tuple[Sequence, SequenceKV, int]] = field(default_factory=list)
    samples: list[tuple[Sequence, SequenceKV]] = field(default_factory=list)
    partial: list[tuple[Sequence, SequenceKV]] = field(default_factory=list)
    scored: list[tuple[Sequence, SequenceKV, int]] = field(default_factory=list)

    def add_row(self, sequence: Sequence, want: int) -> bool:
        """Compute the next `want` tokens of a sequence; if that closes its gap its next token is sampled, and this says so."""
        plan, tokens, kv, start = self.plan, sequence.tokens, sequence.kv, sequence.num_computed
        assert kv is not None
        end = sequence.num_computed = start + want
        is_sampled = end == len(tokens) + sequence.num_pending
        row = len(plan.slots)
        plan.slots.append(sequence.slot)
        plan.starts.append(start)
        plan.lengths.append(want)
        plan.num_tokens += want
        if want == 1 and is_sampled and sequence.sample_step == plan.step - 1:
            plan.prev_rows.append(sequence.sample_index)
        else:
            plan.prev_rows.append(-1)
            plan.token_ids += tokens[start:end]
        if end >= kv.next_commit_tokens:
            self.commits.append((sequence, kv, end))
        if sequence.wants_prompt_logprobs and start < sequence.num_prompt:
            plan.prompt_logprobs.append((row, sequence.request.params.prompt_logprobs or 0))
            targets = tokens[start + 1 : end + 1]
            plan.prompt_targets += (
                targets if len(targets) == want else [*targets, -1]
            )  # the last predicts what nobody knows
            self.scored.append((sequence, kv, start))
        if is_sampled:
            self.add_sample(sequence, kv, row)
        else:
            self.partial.append((sequence, kv))
        return is_sampled

    def add_sample(self, sequence: Sequence, kv: SequenceKV, row: int) -> None:
        """Choose a token for `sequence` from the logits after the last token of `row`."""
        plan = self.plan
        sequence.sample_step, sequence.sample_index = plan.step, len(plan.sample_rows)
        sequence.num_pending += 1
        plan.sample_rows.append(row)
        plan.sample_slots.append(sequence.slot)
        plan.sample_positions.append(sequence.num_computed)
        self.samples.append((sequence, kv))

    def add_decoding(self, decoding: list[Sequence]) -> None:
        """Rows of one token whose next token is sampled (`num_computed` counts it already): columns at a time, for a thousand of them."""
        plan = self.plan
        row, sample, before = len(plan.slots), len(plan.sample_rows), plan.step - 1
        ends = [s.num_computed for s in decoding]
        slots = [s.slot for s in decoding]
        previous = [s.sample_index if s.sample_step == before else -1 for s in decoding]
        plan.slots += slots
        plan.starts += [end - 1 for end in ends]
        plan.lengths += [1] * len(decoding)
        plan.num_tokens += len(decoding)
        plan.prev_rows += previous
        if -1 in previous:
            plan.token_ids += [s.tokens[s.num_computed - 1] for s, at in zip(decoding, previous, strict=True) if at < 0]
        plan.sample_rows += range(row, row + len(decoding))
        plan.sample_slots += slots
        plan.sample_positions += ends
        self.samples += [(s, s.kv) for s in decoding]  # type: ignore[misc]  # a running sequence has its kv
        for index, sequence in enumerate(decoding, sample):
            sequence.sample_step, sequence.sample_index = plan.step, index
            sequence.num_pending += 1
