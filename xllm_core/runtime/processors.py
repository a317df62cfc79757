"""Built-in logits processors: penalties, logit bias, allowed tokens, minimum length. State per slot, work only for slots that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xllm_core.plugins.contracts.sampling import ProcessorContext
from xllm_core.runtime.sampler import NEVER
from xllm_core.types import SlotState


class Penalties:
    """Repetition penalty over prompt and output (Keskar et al., arXiv:1909.05858), frequency and presence penalties over output (OpenAI)."""

    def __init__(self, context: ProcessorContext) -> None:
        self._vocab = context.vocab_size
        self._device = context.torch_device
        self._factors: dict[int, tuple[float, float, float]] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._in_prompt: dict[int, torch.Tensor] = {}

    def admit(self, state: SlotState) -> bool:
        """Count what is there: the only pass over the sequence."""
        p = state.params
        if p.repetition_penalty == 1.0 and p.frequency_penalty == 0.0 and p.presence_penalty == 0.0:
            return False
        self._factors[state.slot] = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
        output = torch.tensor(list(state.output_token_ids), dtype=torch.int64)
        self._counts[state.slot] = torch.bincount(output, minlength=self._vocab).to(self._device, torch.float32)
        seen = torch.zeros(self._vocab, dtype=torch.bool)
        seen[torch.tensor(list(state.prompt_token_ids), dtype=torch.int64)] = True
        self._in_prompt[state.slot] = seen.to(self._device)
        return True

    def release(self, slot: int) -> None:
        """Forget the slot's counts."""
        del self._factors[slot], self._counts[slot], self._in_prompt[slot]

    def fork(self, source: int, destination: int) -> None:
        """Counts go separate ways from here."""
        self._factors[destination] = self._factors[source]
        self._counts[destination] = self._counts[source].clone()
        self._in_prompt[destination] = self._in_prompt[source]

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> None:
        """Vectorised over the rows given."""
        factors = torch.tensor([self._factors[s] for s in slots], dtype=torch.float32, device=logits.device)
        repetition, frequency, presence = factors[:, 0:1], factors[:, 1:2], factors[:, 2:3]
        counts = torch.stack([self._counts[s] for s in slots])
        is_out = counts > 0
        is_seen = is_out | torch.stack([self._in_prompt[s] for s in slots])
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits.copy_(torch.where(is_seen, scaled, logits) - frequency * counts - presence * is_out)

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """One more of each."""
        for slot, token in zip(slots, token_ids, strict=True):
            self._counts[slot][token] += 1


class LogitBias:
    """Adds `logit_bias` to the logits of its tokens."""

    def __init__(self, context: ProcessorContext) -> None:
        self._device = context.torch_device
        self._bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def admit(self, state: SlotState) -> bool:
        """Keep ids and values as tensors."""
        bias = state.params.logit_bias
        if not bias:
            return False
        ids = torch.tensor(list(bias.keys()), dtype=torch.int64, device=self._device)
        values = torch.tensor(list(bias.values()), dtype=torch.float32, device=self._device)
        self._bias[state.slot] = (ids, values)
        return True

    def release(self, slot: int) -> None:
        """Forget the slot's bias."""
        del self._bias[slot]

    def fork(self, source: int, destination: int) -> None:
        """Bias never changes, so it is shared."""
        self._bias[destination] = self._bias[source]

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> None:
        """One indexed add for all rows."""
        rows = torch.cat([torch.full_like(self._bias[s][0], i) for i, s in enumerate(slots)])
        ids = torch.cat([self._bias[s][0] for s in slots])
        logits.index_put_((rows, ids), torch.cat([self._bias[s][1] for s in slots]), accumulate=True)

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Nothing depends on output."""


class AllowedTokens:
    """Makes everything outside `allowed_token_ids` impossible."""

    def __init__(self, context: ProcessorContext) -> None:
        self._vocab = context.vocab_size
        self._device = context.torch_device
        self._forbidden: dict[int, torch.Tensor] = {}

    def admit(self, state: SlotState) -> bool:
        """Build the mask once."""
        allowed = state.params.allowed_token_ids
        if allowed is None:
            return False
        forbidden = torch.ones(self._vocab, dtype=torch.bool)
        forbidden[torch.tensor(list(allowed), dtype=torch.int64)] = False
        self._forbidden[state.slot] = forbidden.to(self._device)
        return True

    def release(self, slot: int) -> None:
        """Forget the slot's mask."""
        del self._forbidden[slot]

    def fork(self, source: int, destination: int) -> None:
        """The mask never changes, so it is shared."""
        self._forbidden[destination] = self._forbidden[source]

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> None:
        """One masked fill for all rows."""
        logits.masked_fill_(torch.stack([self._forbidden[s] for s in slots]), NEVER)

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Nothing depends on output."""


@dataclass(slots=True)
class _Countdown:
    num_left: int
    stop_ids: torch.Tensor


class MinTokens:
    """Keeps end-of-sequence and stop tokens impossible until `min_tokens` have been given out."""

    def __init__(self, context: ProcessorContext) -> None:
        self._device = context.torch_device
        self._vocab = context.vocab_size
        self._state: dict[int, _Countdown] = {}

    def admit(self, state: SlotState) -> bool:
        """Tokens emitted before (by another engine, or before a preemption) count."""
        params = state.params
        left = params.min_tokens - len(state.output_token_ids)
        ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(state.eos_token_ids))
        ids = {i for i in ids if 0 <= i < self._vocab}
        if left <= 0 or not ids:
            return False
        self._state[state.slot] = _Countdown(left, torch.tensor(sorted(ids), dtype=torch.int64, device=self._device))
        return True

    def release(self, slot: int) -> None:
        """Forget the slot's count."""
        del self._state[slot]

    def fork(self, source: int, destination: int) -> None:
        """Counts go separate ways from here."""
        self._state[destination] = _Countdown(self._state[source].num_left, self._state[source].stop_ids)

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> None:
        """Mask the few ids of rows that are still too short."""
        for row, slot in enumerate(slots):
            if self._state[slot].num_left > 0:
                logits[row, self._state[slot].stop_ids] = NEVER

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """One fewer to go."""
        for slot in slots:
            self._state[slot].num_left -= 1
