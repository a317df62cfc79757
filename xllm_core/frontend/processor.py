"""Requests in, answers out: tokenizes and checks what users send, and turns the engine's tokens into `RequestOutput`s."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xllm_core.errors import InvalidRequestError, PromptTooLongError, RequestError
from xllm_core.frontend.client import EngineClient
from xllm_core.frontend.interrupts import deferred_interrupts
from xllm_core.frontend.outputs import RequestState
from xllm_core.frontend.template import ChatTemplate, Message, cut_after_content
from xllm_core.frontend.tokenizer import Tokenizer
from xllm_core.frontend.validation import as_integer, as_token_ids, check_params, check_salt, check_text, shown
from xllm_core.types import EngineRequest, RequestOutput, SamplingParams, TokenOutput

Prompt = str | Sequence[int] | Mapping[str, Any]
_PROMPT_EXTRAS = ("emitted_token_ids", "priority", "cache_salt")
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", *_PROMPT_EXTRAS})
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt that passed every check of the text side. text: as given, None for token ids. request: lacks only its id."""

    text: str | None
    request: EngineRequest


class Processor:
    """The text side of one engine. Not thread-safe; its owner submits and feeds from one thread."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        generation_config: Mapping[str, Any],
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.template = template
        self.default_params = _default_params(generation_config)
        self._eos_token_ids = (
            tokenizer.eos_token_ids if tokenizer is not None else _ids(generation_config.get("eos_token_id"))
        )
        info = client.info()
        self._vocab_size = info.vocab_size
        self._max_len = min(info.max_model_len, info.capacity_tokens + 1)  # the last token's KV is never needed
        self._states: dict[str, RequestState] = {}
        self._counter = itertools.count()

    def prepare(self, prompt: Prompt, params: SamplingParams) -> Prepared:
        """Check and tokenize one prompt; raises RequestError. Keeps nothing of the caller's that could change. Any thread may call it."""
        params = check_params(params, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError(
                "stop strings need a tokenizer, and this model has none; use stop_token_ids", param="stop"
            )
        text, token_ids, extra = self._read(prompt)
        room = self._max_len - len(token_ids)
        if params.max_tokens is None and 0 < room < params.min_tokens:
            raise InvalidRequestError(
                f"min_tokens = {params.min_tokens} exceeds what {len(token_ids)} prompt tokens leave of {self._max_len}; "
                f"lower min_tokens to {room} or shorten the prompt",
                param="min_tokens",
            )
        request = EngineRequest(
            request_id="", prompt_token_ids=token_ids, params=params,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            eos_token_ids=self._eos_token_ids, emitted=self._emitted(extra, params.n),
            priority=_priority(extra.get("priority", 0)), arrival_s=time.monotonic(), salt=check_salt(extra.get("cache_salt")),
        )  # fmt: skip
        return Prepared(text, request)

    def check(self, prepared: Prepared, name: str) -> None:
        """Raise what `enqueue` would raise for a request too long or too large. name: how messages call it before it has an id."""
        self.client.check(replace(prepared.request, request_id=name))

    def enqueue(self, prepared: Prepared, request_id: str | None = None) -> str:
        """Hand a prepared prompt to the engine; returns its id. Raises RequestError and leaves nothing behind, interrupted or not."""
        if request_id is None:
            request_id = next(name for i in self._counter if (name := f"req-{i}") not in self._states)
        elif not isinstance(request_id, str):
            raise InvalidRequestError(f"a request id is a text, got {shown(request_id)}", param="request_id")
        elif request_id in self._states:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another", param="request_id")
        request = replace(prepared.request, request_id=request_id)
        state = RequestState(request, prepared.text, self.tokenizer)
        ended = [output.index for output in state.output.outputs if output.finish_reason is not None]
        if ended and all(i in ended or self._is_over(request, tokens) for i, tokens in enumerate(request.emitted)):
            raise InvalidRequestError(
                f"request {request_id!r}: the emitted tokens end every sequence already; there is nothing to resume",
                param="emitted_token_ids",
            )
        with deferred_interrupts():
            # Known here before it is known there: whatever happens in between, `abort_all` finds it.
            self._states[request_id] = state
            try:
                self.client.submit(request)
            except RequestError:
                del self._states[request_id]  # refused, without a trace in the engine
                raise
            except BaseException:
                self.abort(request_id)
                raise
            for index in ended:
                self.client.abort(request_id, index)
        return request_id

    def output(self, request_id: str) -> RequestOutput:
        """What an unfinished request has so far; filled in place by `feed`. KeyError for one that is not here."""
        return self._states[request_id].output

    def submit(self, prompt: Prompt, params: SamplingParams, request_id: str | None = None) -> str:
        """`prepare` and `enqueue` in one."""
        return self.enqueue(self.prepare(prompt, params), request_id)

    def step(self) -> list[RequestOutput]:
        """One poll of the engine and what it changed, maybe nothing. An interrupt waits until both are done."""
        with deferred_interrupts():
            return self.feed(self.client.poll())

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False,
        add_special_tokens: bool = False, **options: Any,
    ) -> list[int]:  # fmt: skip
        """Token ids of a conversation. continue_final_message: it ends inside the last message, for the model to go on.

        add_special_tokens: once more, where the template has not written them.
        """
        if self.template is None or self.tokenizer is None:
            missing = "chat template" if self.tokenizer is not None else "tokenizer"
            raise InvalidRequestError(
                f"this model has no {missing}, so it cannot chat; use generate with a plain prompt", param="messages"
            )
        text = self.template.render(messages, add_generation_prompt=add_generation_prompt, **options)
        if continue_final_message:
            text = cut_after_content(text, messages)
        check_text(text, "messages")
        self.check_length(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def check_length(self, text: str) -> None:
        """Refuse a text that cannot fit, before the tokenizer spends seconds on it. Raises PromptTooLongError."""
        if self.tokenizer is None:
            return
        at_least = len(text) // self.tokenizer.max_token_chars
        max_model_len = self.client.info().max_model_len
        if at_least >= max_model_len:
            raise PromptTooLongError("prompt", prompt_tokens=at_least, max_model_len=max_model_len)

    def feed(self, outputs: Sequence[TokenOutput]) -> list[RequestOutput]:
        """Take what the engine gave; returns the requests that have something new, each once, filled in place.

        A request whose tokens cannot be turned into an answer ends with finish_reason "error" and `error` set; the others go on.
        """
        changed: dict[str, RequestOutput] = {}
        for new in outputs:
            state = self._states.get(new.request_id)
            if state is None:
                continue  # aborted here a moment ago
            try:
                output = state.feed(new, self.client.abort)
            except Exception as error:  # noqa: BLE001  it is the answer of this one request, and no other is touched
                _log.error("request %r failed", new.request_id, exc_info=error)
                output = self._fail(state, error)
            changed[new.request_id] = output
            if output.finished:
                del self._states[new.request_id]
        return list(changed.values())

    def abort(self, request_id: str) -> RequestOutput | None:
        """Drop a request; returns what it had, its unfinished sequences marked "abort", or None if it is not there."""
        self.client.abort(request_id)
        state = self._states.pop(request_id, None)
        return None if state is None else state.end("abort")

    def abort_all(self) -> None:
        """Drop everything: an interrupted caller leaves nothing behind."""
        with deferred_interrupts():
            for request_id in list(self._states):
                self.abort(request_id)

    def _fail(self, state: RequestState, error: Exception) -> RequestOutput:
        self.client.abort(state.output.request_id)
        state.output.error = f"{type(error).__name__}: {error}"
        return state.end("error")

    def _is_over(self, request: EngineRequest, emitted: Sequence[int]) -> bool:
        """Whether the engine sees the end of a resumed sequence in its tokens."""
        params = request.params
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else request.eos_token_ids)
        room = self._max_len - len(request.prompt_token_ids)
        limit = params.max_tokens if params.max_tokens is not None else room
        return bool(emitted) and (emitted[-1] in stops or len(emitted) >= limit)

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int], Mapping[str, Any]]:
        """(text, token ids, further keys) of a prompt in any of its forms."""
        extra: Mapping[str, Any] = {}
        if isinstance(prompt, Mapping):
            extra = prompt
            unknown = set(prompt) - _PROMPT_KEYS
            if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise InvalidRequestError(
                    f"a prompt mapping needs either prompt or prompt_token_ids, and may have {', '.join(_PROMPT_EXTRAS)}; "
                    f"got {sorted(map(str, prompt))}",
                    param="prompt",
                )
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("this model has no tokenizer; give the prompt as token ids", param="prompt")
            check_text(prompt, "prompt")
            self.check_length(prompt)
            token_ids = self.tokenizer.encode(prompt)
            if not token_ids:
                raise InvalidRequestError("the prompt is empty; give at least one character", param="prompt")
            return prompt, token_ids, extra
        ids = as_token_ids(prompt)
        if ids is None:
            raise InvalidRequestError(
                f"a prompt is a text or a list of token ids, got {type(prompt).__name__} {shown(prompt)}",
                param="prompt",
            )
        self._check_vocabulary(ids, "prompt")
        if not ids:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        return None, ids, extra

    def _emitted(self, extra: Mapping[str, Any], n: int) -> list[list[int]]:
        """One list of ids for n = 1, or a list of n of them."""
        given = extra.get("emitted_token_ids")
        if given is None:
            return []
        one = as_token_ids(given)
        if one is not None:
            lists: list[list[int] | None] = [one] if one else []
        elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
            lists = [as_token_ids(tokens) for tokens in given]
        else:
            lists = [None]
        taken = [tokens for tokens in lists if tokens is not None]
        if len(taken) != len(lists):
            raise InvalidRequestError(
                f"emitted_token_ids are lists of token ids, got {shown(given)}", param="emitted_token_ids"
            )
        if taken and len(taken) != n:
            raise InvalidRequestError(
                f"emitted tokens of {len(taken)} sequences for n = {n}; give one list each", param="emitted_token_ids"
            )
        for tokens in taken:
            self._check_vocabulary(tokens, "emitted_token_ids")
        return taken

    def _check_vocabulary(self, ids: Sequence[int], param: str) -> None:
        bad = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(
                f"token id {shown(bad)} in {param} is outside the vocabulary 0..{self._vocab_size - 1}", param=param
            )


def _priority(value: object) -> int:
    priority = as_integer(value)
    if priority is None or abs(priority) >> 63:
        raise InvalidRequestError(
            f"priority = {shown(value)} is not possible: it must be a 64-bit integer, lower is served first",
            param="priority",
        )
    return priority


def _ids(value: int | Sequence[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset((value,) if isinstance(value, int) else value)


def _default_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What the model's authors recommend; greedy where they switched sampling off."""
    params = SamplingParams(max_tokens=None)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        given = {"temperature": 0.0} | {k: v for k, v in given.items() if k == "repetition_penalty"}
    return replace(params, **given)
