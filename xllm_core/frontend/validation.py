"""Checks of sampling parameters: every refusal names the field, the value and what is allowed. Nothing is clamped."""

from __future__ import annotations

import math
from collections.abc import Iterable

from xllm_core.errors import InvalidRequestError
from xllm_core.types import SamplingParams

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
_INT64 = 1 << 63


def check_params(
    params: SamplingParams,
    *,
    vocab_size: int,
    eos_token_ids: frozenset[int] = frozenset(),
    max_logprobs: int = MAX_LOGPROBS,
) -> None:
    """Refuse what cannot be sampled. Raises InvalidRequestError; lengths against the context are the engine's to check."""
    _check_counts(params, max_logprobs)
    _check_numbers(params)
    _check_stops(params, vocab_size)
    _check_token_maps(params, vocab_size, eos_token_ids)


def stop_strings(params: SamplingParams) -> tuple[str, ...]:
    """`params.stop` as a tuple, whether it was given as one string or several."""
    return (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)


def _refuse(field: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} = {value!r} is not possible: it must be {allowed}", param=field)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(field: str, value: object, low: int, high: int | None) -> None:
    is_within = (
        isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    )
    if not is_within:
        raise _refuse(
            field, value, f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        )


def _number(field: str, value: object, low: float, high: float, *, is_low_open: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (is_low_open and value == low):  # type: ignore[operator]
        bounds = f"above {low:g}" if is_low_open else f"at least {low:g}"
        bounds += "" if math.isinf(high) else f" and at most {high:g}"
        raise _refuse(field, value, f"a finite number, {bounds}")


def _check_counts(params: SamplingParams, max_logprobs: int) -> None:
    _integer("n", params.n, 1, MAX_N)
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 1, None)
    _integer("min_tokens", params.min_tokens, 0, None)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens = {params.min_tokens} exceeds max_tokens = {params.max_tokens}; lower the one or raise the other",
            param="min_tokens",
        )
    for field, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if value is not None:
            _integer(field, value, 0, max_logprobs)
    if params.seed is not None:
        _integer("seed", params.seed, -_INT64, _INT64 - 1)


def _check_numbers(params: SamplingParams) -> None:
    _number("temperature", params.temperature, 0.0, 2.0)
    _number("top_p", params.top_p, 0.0, 1.0, is_low_open=True)
    _integer("top_k", params.top_k, -1, None)
    _number("min_p", params.min_p, 0.0, 1.0)
    _number("repetition_penalty", params.repetition_penalty, 0.0, math.inf, is_low_open=True)
    _number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _number("presence_penalty", params.presence_penalty, -2.0, 2.0)


def _check_stops(params: SamplingParams, vocab_size: int) -> None:
    stops = stop_strings(params)
    if len(stops) > MAX_STOP_STRINGS:
        raise _refuse("stop", f"{len(stops)} strings", f"at most {MAX_STOP_STRINGS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise _refuse("stop", stop, "strings that are not empty")
    _token_ids("stop_token_ids", params.stop_token_ids, vocab_size)


def _token_ids(field: str, ids: Iterable[object], vocab_size: int) -> None:
    for token in ids:
        if not _is_int(token) or not 0 <= token < vocab_size:  # type: ignore[operator]
            raise _refuse(field, token, f"a token id from 0 to {vocab_size - 1}")


def _check_token_maps(params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
    if params.logit_bias:
        if len(params.logit_bias) > MAX_LOGIT_BIAS:
            raise _refuse("logit_bias", f"{len(params.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS} entries")
        _token_ids("logit_bias", params.logit_bias, vocab_size)
        for token, value in params.logit_bias.items():
            _number(f"logit_bias[{token}]", value, -100.0, 100.0)
    if params.allowed_token_ids is None:
        return
    if not params.allowed_token_ids:
        raise _refuse("allowed_token_ids", [], "None, or a list with at least one token id")
    _token_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
    if params.min_tokens > 0 and set(params.allowed_token_ids) <= stops:
        raise InvalidRequestError(
            f"min_tokens = {params.min_tokens} forbids the tokens that end a sequence, and allowed_token_ids permits nothing else; "
            "lower min_tokens to 0 or allow another token",
            param="allowed_token_ids",
        )
