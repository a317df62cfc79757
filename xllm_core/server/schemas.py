"""Request bodies of the OpenAI routes, and what becomes of fields that are not in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xllm_core.config_sources import guess
from xllm_core.errors import InvalidRequestError
from xllm_core.frontend.validation import shown

HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
)
"""Accepted and counted, though they change nothing: they speak of accounts, or of tools that are not there."""


class Body(BaseModel):
    """Types are strict: "2" is not 2, and true is no number."""

    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Generation(Body):
    """What both generating routes take. None: the server's default, which is the model's own where it has one."""

    model: str | None = Field(None, description="A name of /v1/models; left out, the served model.")
    n: int | None = Field(None, description="Answers per prompt.")
    max_tokens: int | None = Field(None, description="Most new tokens.")
    min_tokens: int | None = Field(None, description="New tokens before which nothing ends the text.")
    temperature: float | None = Field(None, description="0 is greedy, at most 2.")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1 is off.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = Field(None, description="Repeats the same answer whatever else runs; -1 is none.")
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Token id to a number from -100 to 100.")
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = Field(None, description="Likeliest tokens per prompt position; not with stream.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(None, description="Lower is served first; needs the policy `priority`.")
    cache_salt: str | None = Field(None, description="Separates prefix caches: only equal salts share.")
    request_id: str | None = Field(None, description="A label for logs, given back in X-Request-Id.")
    return_token_ids: bool | None = Field(None, description="Adds token_ids to choices, and the prompt's.")
    add_special_tokens: bool | None = None


class CompletionBody(_Generation):
    """`POST /v1/completions`."""

    prompt: Any = Field(description="A text, a list of texts, a list of token ids, or a list of such lists.")
    logprobs: int | None = Field(None, description="Likeliest tokens to report beside each chosen one.")
    echo: bool | None = Field(None, description="The prompt stands before the answer, with its logprobs if asked for.")
    best_of: int | None = Field(None, description="Only equal to n: nothing is ranked.")


class ChatBody(_Generation):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(description="The conversation; content is a text or a list of text parts.")
    max_completion_tokens: int | None = Field(None, description="As max_tokens, and before it.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="The answer continues the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the template.")


class TokenizeBody(Body):
    """`POST /tokenize`: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


_NONE_OF_IT: tuple[Any, ...] = (None, [], {}, "", False)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "include_reasoning": (None, True),
    "truncation_side": (None, "left"),
    "spaces_between_special_tokens": (None, True),
}  # fmt: skip
"""Fields that are known and not supported yet, where more than emptiness asks for nothing."""

UNSUPPORTED = frozenset(_NEUTRAL) | {
    "suffix", "bad_words", "truncate_prompt_tokens", "prompt_embeds", "structured_outputs", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "guided_decoding_backend", "regex", "ebnf", "json_schema", "chat_template", "documents",
    "reasoning_effort", "thinking_token_budget", "verbosity", "prediction", "audio", "web_search_options", "use_beam_search", "beam_width",
    "length_penalty", "early_stopping", "return_tokens_as_token_ids", "kv_transfer_params", "logits_processors", "mm_processor_kwargs",
    "offline", "ttft_slo_ms", "tpot_slo_ms", "ttlt_slo_ms", "echo", "best_of", "vllm_xargs", "input_text", "lora_path",
}  # fmt: skip

_ELSEWHERE = {
    ("ChatBody", "prompt"): "; a prompt goes to /v1/completions, a conversation is sent as messages",
    ("CompletionBody", "messages"): "; a conversation goes to /v1/chat/completions, this route takes a prompt",
}

_Model = TypeVar("_Model", bound=Body)


def parse(model: type[_Model], body: dict[str, Any], on_ignored: Callable[[str], None] = lambda name: None) -> _Model:
    """Check a body against a model. Raises InvalidRequestError that names the field: unknown with a guess, known but not supported, wrong.

    on_ignored: called with the name of each harmless field that was passed over.
    """
    known = model.model_fields
    taken: dict[str, Any] = {}
    for name, value in body.items():
        if name in known:
            taken[name] = value
        elif name in HARMLESS and issubclass(model, _Generation):
            on_ignored(name)
        elif name in UNSUPPORTED:
            if not any(type(value) is type(n) and value == n for n in _NEUTRAL.get(name, _NONE_OF_IT)):
                raise InvalidRequestError(
                    f"{name} = {shown(value)} is not supported by this server; leave it out", param=name
                )
        else:
            hint = _ELSEWHERE.get((model.__name__, name)) or guess(name, known)
            raise InvalidRequestError(f"unknown field {shown(name)}{hint}", param=name[:64])
    try:
        return model.model_validate(taken)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> InvalidRequestError:
    problem = error.errors(include_url=False, include_context=False)[0]
    path = [part for part in problem["loc"] if part not in ("str", "list[str]")]
    name = str(path[0]) if path else "body"
    where = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[1:])
    if problem["type"] == "missing":
        return InvalidRequestError(f"{where} is missing", param=name)
    reason = problem["msg"]
    return InvalidRequestError(f"{where} = {shown(problem['input'])}: {reason[:1].lower() + reason[1:]}", param=name)
