"""OpenAI's shapes in both directions: bodies to prompts and sampling parameters, outputs to choices. No HTTP, no waiting."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xllm_core.errors import InvalidRequestError, PromptTooLongError
from xllm_core.frontend.processor import Prepared, Processor, Prompt
from xllm_core.frontend.tokenizer import Tokenizer
from xllm_core.frontend.validation import MAX_LOGIT_BIAS, MAX_LOGPROBS, shown
from xllm_core.server.schemas import ChatBody, CompletionBody
from xllm_core.types import CompletionOutput, Logprob, RequestOutput, SamplingParams

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it
MIN_LOGPROB = -9999.0  # JSON has no infinity
_TEMPLATE_NAMES = frozenset(
    {
        "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens", "tools", "documents", "tokenize", "return_dict",
        "bos_token", "eos_token", "chat_template",
    }
)  # fmt: skip
_MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"})
_EMPTY_MESSAGE_KEYS = frozenset(
    {"refusal", "audio", "function_call", "annotations"}
)  # clients send answers back as they got them
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PLAIN = (
    "n", "min_tokens", "frequency_penalty", "presence_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "skip_special_tokens", "allowed_token_ids", "prompt_logprobs",
)  # fmt: skip


Entries = Sequence[tuple[int, Mapping[int, Logprob] | None]]


@dataclass(frozen=True, slots=True)
class Job:
    """One request, understood. prompts: one per choice group. num_top: likeliest tokens to report, None for no logprobs.

    is_echo_only: the prompt alone was asked for (max_tokens 0); the engine still makes one token, which nobody sees.
    """

    is_chat: bool
    prompts: Sequence[Prompt]
    params: SamplingParams
    is_stream: bool
    has_usage: bool
    has_usage_always: bool
    num_top: int | None
    has_token_ids: bool
    is_echo: bool = False
    is_echo_only: bool = False
    add_special_tokens: bool = True
    model: str = ""
    label: str | None = None


def completion_job(body: CompletionBody, processor: Processor, *, max_prompts: int) -> Job:
    """Understand a completion request. Raises InvalidRequestError; what only vocabulary and context decide is checked when it is prepared."""
    prompts = _prompts(body.prompt, max_prompts)
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequestError(
            f"best_of = {shown(body.best_of)} beside n = {shown(n)} is not supported: nothing is ranked; leave best_of out",
            param="best_of",
        )
    is_echo = body.echo is True
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    is_echo_only = is_echo and max_tokens == 0
    params = _params(body, processor, max_tokens=1 if is_echo_only else max_tokens, logprobs=body.logprobs)
    if is_echo and body.logprobs is not None:
        if body.prompt_logprobs not in (None, body.logprobs):
            raise InvalidRequestError(
                f"prompt_logprobs = {shown(body.prompt_logprobs)} beside echo and logprobs = {shown(body.logprobs)}: they report the same positions; "
                "leave prompt_logprobs out, or give both one number",
                param="prompt_logprobs",
            )
        params = replace(params, prompt_logprobs=body.logprobs)
    return Job(
        is_chat=False, prompts=_salted(prompts, body), params=params, num_top=body.logprobs, is_echo=is_echo, is_echo_only=is_echo_only,
        add_special_tokens=body.add_special_tokens is not False, **_common(body),
    )  # fmt: skip


def chat_job(body: ChatBody, processor: Processor) -> Job:
    """Understand a chat request; renders its template, which may take milliseconds. Raises InvalidRequestError."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    if num_top is not None and not 0 <= num_top <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs = {shown(num_top)} is not possible: it must be an integer from 0 to {MAX_LOGPROBS}",
            param="top_logprobs",
        )
    if body.max_completion_tokens is not None and body.max_completion_tokens < 1:
        raise InvalidRequestError(
            f"max_completion_tokens = {body.max_completion_tokens} is not possible: it must be at least 1",
            param="max_completion_tokens",
        )
    params = _params(body, processor, max_tokens=max_tokens, logprobs=num_top)
    token_ids = conversation(
        body.messages, processor, add_generation_prompt=body.add_generation_prompt, continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs, add_special_tokens=body.add_special_tokens is True,
    )  # fmt: skip
    return Job(is_chat=True, prompts=_salted([token_ids], body), params=params, num_top=num_top, **_common(body))


def conversation(
    messages: Sequence[Mapping[str, Any]], processor: Processor, *, add_generation_prompt: bool | None, continue_final_message: bool | None,
    template_kwargs: Mapping[str, Any] | None, add_special_tokens: bool = False,
) -> list[int]:  # fmt: skip
    """Token ids of a conversation as these routes take it."""
    if add_generation_prompt and continue_final_message:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message cannot both be true; the one begins a message, the other goes on with one",
            param="continue_final_message",
        )
    options = dict(template_kwargs or {})
    if taken := _TEMPLATE_NAMES & set(options):
        raise InvalidRequestError(
            f"chat_template_kwargs may not set {sorted(taken)[0]!r}, which the server sets itself",
            param="chat_template_kwargs",
        )
    flat = [_flat_message(message, i) for i, message in enumerate(messages)]
    begins = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    return processor.render(
        flat, add_generation_prompt=begins, continue_final_message=bool(continue_final_message), add_special_tokens=add_special_tokens,
        **options,
    )  # fmt: skip


def _flat_message(message: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Content parts become one text; a part that is no text is refused by name, and so is a key that no message has."""
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and not (key in _EMPTY_MESSAGE_KEYS and value in (None, [], {}, "")):
            what = "is not supported" if key in _EMPTY_MESSAGE_KEYS else "no message has"
            raise InvalidRequestError(
                f"messages[{index}] has the key {shown(key)}, which {what}; leave it out", param="messages"
            )
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [_part_text(part, f"messages[{index}].content[{j}]") for j, part in enumerate(content)]
    return {**message, "content": "\n".join(texts)}


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise InvalidRequestError(f"{where} has type {shown(kind)}; this model takes text parts only", param="messages")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where}.text = {shown(text)}: it must be a text", param="messages")
    if unknown := sorted(part.keys() - {"type", "text"}):
        raise InvalidRequestError(f"{where} has the unknown key {shown(unknown[0])}; leave it out", param="messages")
    return text


def _common(body: CompletionBody | ChatBody) -> dict[str, Any]:
    stream = body.stream is True
    options = body.stream_options
    if options is not None and not stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
    if stream and body.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs cannot be streamed; set stream to false", param="prompt_logprobs")
    has_usage = options is not None and options.include_usage is True
    return {
        "is_stream": stream,
        "has_usage": has_usage,
        "has_usage_always": has_usage and options is not None and options.continuous_usage_stats is True,
        "has_token_ids": body.return_token_ids is True,
        "label": body.request_id,
    }


def _params(
    body: CompletionBody | ChatBody, processor: Processor, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """What was given, over the server's defaults."""
    default = processor.default_params
    given = {name: value for name in (*_DEFAULTED, *_PLAIN) if (value := getattr(body, name)) is not None}
    if given.get("seed") == -1:
        del given["seed"]
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    return replace(default, max_tokens=max_tokens, logprobs=logprobs, **given)


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    if len(given) > MAX_LOGIT_BIAS:  # before a million keys are read
        raise InvalidRequestError(
            f"logit_bias has {len(given)} entries; it must be at most {MAX_LOGIT_BIAS}", param="logit_bias"
        )
    return {_token_key(key): value for key, value in given.items()}


def _token_key(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 20):
        raise InvalidRequestError(f"logit_bias has the key {shown(key)}; keys are token ids", param="logit_bias")
    return int(key)


def _prompts(given: Any, max_prompts: int) -> list[Prompt]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise InvalidRequestError(
            f"prompt = {shown(given)}: it must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty",
            param="prompt",
        )
    if all(type(token) is int for token in given):
        return [given]
    is_texts = all(isinstance(one, str) for one in given)
    if not is_texts and not all(isinstance(one, list) and all(type(token) is int for token in one) for one in given):
        raise InvalidRequestError(
            f"prompt = {shown(given)} mixes kinds: give texts only, or lists of token ids (whole numbers) only",
            param="prompt",
        )
    if len(given) > max_prompts:
        raise InvalidRequestError(
            f"prompt has {len(given)} entries, at most {max_prompts} are taken at once ([server] max_prompts_per_request)",
            param="prompt",
        )
    return list(given)


def _salted(prompts: Sequence[Prompt], body: CompletionBody | ChatBody) -> list[Prompt]:
    extra = {"cache_salt": body.cache_salt, "priority": body.priority or 0}
    return [{"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, **extra} for prompt in prompts]


def prepare(job: Job, processor: Processor) -> list[Prepared]:
    """Check and tokenize every prompt; takes long for long texts, and any thread may do it. Raises RequestError that names the prompt."""
    ready = []
    for i, prompt in enumerate(job.prompts):
        try:
            ready.append(_prepare_one(job, prompt, processor))
        except InvalidRequestError as error:
            if len(job.prompts) == 1:
                raise
            raise InvalidRequestError(f"prompt[{i}]: {error}", param=error.param) from error
        except PromptTooLongError as error:
            name = "prompt" if len(job.prompts) == 1 else f"prompt[{i}]"
            raise PromptTooLongError(
                name, prompt_tokens=error.prompt_tokens, max_model_len=error.max_model_len
            ) from error
    return ready


def _prepare_one(job: Job, prompt: Prompt, processor: Processor) -> Prepared:
    assert isinstance(prompt, Mapping)
    text = prompt.get("prompt")
    if text is not None and not job.add_special_tokens and processor.tokenizer is not None:
        processor.check_length(text)
        extra = {key: value for key, value in prompt.items() if key != "prompt"}
        ids = processor.tokenizer.encode(text, add_special_tokens=False)
        return replace(processor.prepare({**extra, "prompt_token_ids": ids}, job.params), text=text)
    prepared = processor.prepare(prompt, job.params)
    if job.is_echo and prepared.text is None and processor.tokenizer is not None:
        words = processor.tokenizer.decode(
            prepared.request.prompt_token_ids, skip_special_tokens=job.params.skip_special_tokens
        )
        return replace(prepared, text=words)
    return prepared


# ---- answers ------------------------------------------------------------------------------------------------------------------


class Reply:
    """Makes the objects of one answer. created, id and model are the same in every chunk of it."""

    def __init__(self, job: Job, request_id: str, tokenizer: Tokenizer | None) -> None:
        self.job = job
        self._tokenizer = tokenizer
        self.id = f"{'chatcmpl' if job.is_chat else 'cmpl'}-{request_id}"
        self._created = int(time.time())

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response of a request that is not streamed."""
        job = self.job
        choices = [
            self._choice(group, output, i * job.params.n + output.index)
            for i, group in enumerate(outputs)
            for output in group.outputs
        ]
        kind = "chat.completion" if job.is_chat else "text_completion"
        head = self.head(kind) | {"choices": choices, "usage": self.usage(outputs)}
        if job.is_chat and job.has_token_ids:
            head["prompt_token_ids"] = outputs[0].prompt_token_ids
        if job.is_chat and outputs[0].prompt_logprobs is not None:
            head["prompt_logprobs"] = _prompt_logprobs(outputs[0])
        return head

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of the answer begins with."""
        return {"id": self.id, "object": kind, "created": self._created, "model": self.job.model}

    def usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Tokens so far, over all prompts and choices."""
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        new = 0 if self.job.is_echo_only else sum(len(o.token_ids) for output in outputs for o in output.outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
        }

    def logprobs(self, output: CompletionOutput, first: int, end: int, offset: int = 0) -> dict[str, Any] | None:
        """Logprobs of the tokens first..end of one sequence; None where nobody asked. offset: characters of the tokens before them."""
        if self.job.num_top is None or output.logprobs is None:
            return None
        entries = list(zip(output.token_ids[first:end], output.logprobs[first:end], strict=True))
        return self._chat_logprobs(entries) if self.job.is_chat else self._text_logprobs(entries, offset)

    def _choice(self, group: RequestOutput, output: CompletionOutput, index: int) -> dict[str, Any]:
        job = self.job
        choice: dict[str, Any] = {"index": index}
        text = output.text
        if job.is_chat:
            choice["message"] = {"role": "assistant", "content": text}
            choice["logprobs"] = self.logprobs(output, 0, len(output.token_ids))
        else:
            end = 0 if job.is_echo_only else len(output.token_ids)
            choice["text"] = echo_text(group, job) + ("" if job.is_echo_only else text)
            choice["logprobs"] = self.echoed(group, output, end) if job.is_echo else self.logprobs(output, 0, end)
            if group.prompt_logprobs is not None:
                choice["prompt_logprobs"] = _prompt_logprobs(group)
        choice["finish_reason"] = "length" if job.is_echo_only else output.finish_reason
        choice["stop_reason"] = None if job.is_echo_only else output.stop_reason
        if job.has_token_ids:
            choice["token_ids"] = [] if job.is_echo_only else output.token_ids
            if not job.is_chat:
                choice["prompt_token_ids"] = group.prompt_token_ids
        return choice

    def echoed(self, group: RequestOutput, output: CompletionOutput, end: int) -> dict[str, Any] | None:
        """Logprobs of the prompt and of the answer's tokens up to `end`, in one list; the first prompt token has none."""
        if self.job.num_top is None or group.prompt_logprobs is None or output.logprobs is None:
            return None
        ids = [*group.prompt_token_ids, *output.token_ids[:end]]
        return self._text_logprobs(list(zip(ids, [*group.prompt_logprobs, *output.logprobs[:end]], strict=True)))

    def _text_logprobs(self, entries: Entries, offset: int = 0) -> dict[str, Any]:
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets = []
        for token, scores in entries:
            text = scores[token].decoded_token if scores is not None else self._token_text(token)
            tokens.append(text)
            chosen.append(_finite(scores[token].logprob) if scores is not None else None)
            top.append(None if scores is None else _by_text(scores))
            offsets.append(offset)
            offset += len(text)
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}

    def _token_text(self, token: int) -> str:
        return self._tokenizer.token_text(token) if self._tokenizer is not None else ""

    def _chat_logprobs(self, entries: Entries) -> dict[str, Any]:
        content, num_top = [], self.job.num_top or 0
        for token, scores in entries:
            if scores is None:
                continue
            ranked = [(i, one) for i, one in scores.items() if one.rank is not None and one.rank <= num_top]
            top = [self._scored(i, one) for i, one in ranked]
            content.append(self._scored(token, scores[token]) | {"top_logprobs": top})
        return {"content": content}

    def _scored(self, token: int, one: Logprob) -> dict[str, Any]:
        text = one.decoded_token
        is_part = "\ufffd" in text and self._tokenizer is not None
        raw = self._tokenizer.token_bytes(token) if is_part and self._tokenizer is not None else text.encode()
        return {"token": text, "logprob": _finite(one.logprob), "bytes": list(raw)}


def echo_text(group: RequestOutput, job: Job) -> str:
    """The prompt as text, where echo was asked for; a prompt of token ids was decoded when it was prepared."""
    return (group.prompt or "") if job.is_echo else ""


def _by_text(scores: Mapping[int, Logprob]) -> dict[str, float]:
    """Scores by the tokens' text, likeliest first. Of tokens that show as the same text (parts of characters) the likeliest counts."""
    found: dict[str, float] = {}
    for one in scores.values():
        found.setdefault(one.decoded_token, _finite(one.logprob))
    return found


def _prompt_logprobs(group: RequestOutput) -> list[dict[str, Any] | None]:
    return [
        None if scores is None else {
            str(token): {"logprob": _finite(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in scores.items()
        }
        for scores in group.prompt_logprobs or ()
    ]  # fmt: skip


def _finite(value: float) -> float:
    return value if value > MIN_LOGPROB else MIN_LOGPROB
