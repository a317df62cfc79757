"""Requests in, answers out: tokenizes and checks what users send, and turns the engine's tokens into `RequestOutput`s."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xllm_core.errors import InvalidRequestError
from xllm_core.frontend.client import EngineClient
from xllm_core.frontend.outputs import RequestState
from xllm_core.frontend.template import ChatTemplate, Message
from xllm_core.frontend.tokenizer import Tokenizer
from xllm_core.frontend.validation import check_params
from xllm_core.types import EngineRequest, RequestOutput, SamplingParams, TokenOutput

Prompt = str | Sequence[int] | Mapping[str, Any]
_PROMPT_EXTRAS = ("emitted_token_ids", "priority", "cache_salt")
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", *_PROMPT_EXTRAS})


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
        self._vocab_size = client.info().vocab_size
        self._states: dict[str, RequestState] = {}
        self._counter = itertools.count()

    def submit(self, prompt: Prompt, params: SamplingParams, request_id: str | None = None) -> str:
        """Check, tokenize and queue one prompt; returns its id. Raises RequestError and leaves nothing behind."""
        check_params(params, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError(
                "stop strings need a tokenizer, and this model has none; use stop_token_ids", param="stop"
            )
        text, token_ids, extra = self._read(prompt)
        request_id = request_id if request_id is not None else f"req-{next(self._counter)}"
        request = EngineRequest(
            request_id=request_id, prompt_token_ids=token_ids, params=params,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            eos_token_ids=self._eos_token_ids, emitted=self._emitted(extra), priority=_priority(extra.get("priority", 0)),
            arrival_s=time.monotonic(), salt=str(extra.get("cache_salt", "")),
        )  # fmt: skip
        self.client.submit(request)
        self._states[request_id] = RequestState(request, text, self.tokenizer)
        return request_id

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any) -> list[int]:
        """Token ids of a conversation."""
        if self.template is None or self.tokenizer is None:
            missing = "chat template" if self.tokenizer is not None else "tokenizer"
            raise InvalidRequestError(
                f"this model has no {missing}, so it cannot chat; use generate with a plain prompt", param="messages"
            )
        text = self.template.render(messages, add_generation_prompt=add_generation_prompt, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template has written them

    def feed(self, outputs: Sequence[TokenOutput]) -> list[RequestOutput]:
        """Take what the engine gave; returns the requests that have something new, each once, filled in place."""
        changed: dict[str, RequestOutput] = {}
        for new in outputs:
            state = self._states.get(new.request_id)
            if state is None:
                continue  # aborted here a moment ago
            output = state.feed(new, self.client.abort)
            changed[new.request_id] = output
            if output.finished:
                del self._states[new.request_id]
        return list(changed.values())

    def abort(self, request_id: str) -> RequestOutput | None:
        """Drop a request; returns what it had, its unfinished sequences marked "abort", or None if it is not there."""
        self.client.abort(request_id)
        state = self._states.pop(request_id, None)
        if state is None:
            return None
        for output in state.output.outputs:
            output.finish_reason = output.finish_reason or "abort"
        state.output.finished = True
        return state.output

    def abort_all(self) -> None:
        """Drop everything: an interrupted caller leaves nothing behind."""
        for request_id in list(self._states):
            self.abort(request_id)

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
            token_ids = self.tokenizer.encode(prompt)
            if not token_ids:
                raise InvalidRequestError("the prompt is empty; give at least one character", param="prompt")
            return prompt, token_ids, extra
        is_list = isinstance(prompt, Sequence) and all(_is_id(token) for token in prompt)
        if not is_list:
            raise InvalidRequestError(
                f"a prompt is a text or a list of token ids, got {type(prompt).__name__} {prompt!r:.60}", param="prompt"
            )
        return None, [int(t) for t in prompt], extra

    @staticmethod
    def _emitted(extra: Mapping[str, Any]) -> Sequence[Sequence[int]]:
        """One list of ids for n = 1, or a list of them; the engine checks count and range."""
        emitted = extra.get("emitted_token_ids") or ()
        lists = [emitted] if emitted and all(_is_id(token) for token in emitted) else list(emitted)
        for tokens in lists:
            if not isinstance(tokens, Sequence) or not all(_is_id(token) for token in tokens):
                raise InvalidRequestError(
                    f"emitted_token_ids are lists of token ids, got {tokens!r:.60}", param="emitted_token_ids"
                )
        return [list(tokens) for tokens in lists]


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _priority(value: object) -> int:
    if not _is_id(value):
        raise InvalidRequestError(
            f"priority = {value!r:.40} is not possible: it must be an integer, lower is served first", param="priority"
        )
    return value  # type: ignore[return-value]


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
