"""What can ever be served here: the part of admission that needs no queue, so that a front end can refuse at its own door."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_core.errors import InvalidRequestError, PromptTooLongError, RequestTooLargeError
from xllm_core.types import EngineRequest


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds of one engine. Plain data that crosses processes.

    max_model_len: tokens of a context. capacity_tokens: the longest sequence the KV pool holds. max_num_seqs: sequences that run at once.
    uses_priority: the scheduling policy reads priorities.
    """

    max_model_len: int
    capacity_tokens: int
    max_num_seqs: int
    uses_priority: bool = False

    def check(self, request: EngineRequest) -> int:
        """The length at which `request` ends at the latest, in tokens; raises RequestError for what can never run here."""
        params, prompt = request.params, len(request.prompt_token_ids)
        context, capacity = self.max_model_len, self.capacity_tokens
        if prompt >= context:
            raise PromptTooLongError(request.request_id, prompt_tokens=prompt, max_model_len=context)
        max_tokens = params.max_tokens
        if max_tokens is None:
            max_tokens = max(1, min(context, capacity + 1) - prompt)
        elif prompt + max_tokens > context:
            raise InvalidRequestError(
                f"request {request.request_id!r}: prompt {prompt} + max_tokens {max_tokens} exceeds the context of {context} tokens; "
                f"lower max_tokens to {context - prompt} or shorten the prompt",
                param="max_tokens",
            )
        if prompt + max_tokens - 1 > capacity:
            raise RequestTooLargeError(
                request.request_id, prompt_tokens=prompt, max_tokens=max_tokens, capacity_tokens=capacity
            )
        self._check_shape(request, max_tokens)
        return prompt + max_tokens

    def _check_shape(self, request: EngineRequest, max_tokens: int) -> None:
        if request.priority and not self.uses_priority:
            raise InvalidRequestError(
                f"request {request.request_id!r}: priority = {request.priority}, and the scheduling policy in use does not read priorities; "
                'leave it at 0, or start with [use] scheduler = "priority"',
                param="priority",
            )
        if request.params.n > self.max_num_seqs:
            raise InvalidRequestError(
                f"request {request.request_id!r}: n = {request.params.n} sequences do not fit [scheduler] max_num_seqs = "
                f"{self.max_num_seqs}; lower n or raise the setting",
                param="n",
            )
        if any(len(tokens) > max_tokens for tokens in request.emitted):
            raise InvalidRequestError(
                f"request {request.request_id!r}: {max(map(len, request.emitted))} tokens are emitted already, max_tokens is {max_tokens};"
                " raise max_tokens, or do not resume what is over",
                param="emitted",
            )
