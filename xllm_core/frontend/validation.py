"""Checks of what users ask for: every refusal names the field, the value and what is allowed. Nothing is clamped."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Mapping, Set, Sized
from dataclasses import replace
from typing import Any

from xllm_core.errors import InvalidRequestError
from xllm_core.types import SamplingParams

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_SALT_CHARS = 1024
MIN_TEMPERATURE = 1e-5  # logits are divided by it; below this they leave float32, and greedy is meant anyway
REPETITION_PENALTIES = (
    1e-3,
    1e3,
)  # logits are multiplied by it once; far beyond what changes an answer, well inside float32
_INT32_MAX = (1 << 31) - 1
_INT64 = 1 << 63
_SHORT = reprlib.Repr()  # reads the beginning of a value only, however large it is
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 300
_BOOLS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


def check_params(
    params: SamplingParams,
    *,
    vocab_size: int,
    eos_token_ids: frozenset[int] = frozenset(),
    max_logprobs: int = MAX_LOGPROBS,
) -> SamplingParams:
    """Refuse what cannot be sampled; returns a copy that shares nothing changeable with `params`.

    In the copy `stop`, `stop_token_ids` and `allowed_token_ids` are tuples (None for the first two means none), token ids are plain
    integers. Raises InvalidRequestError; lengths against the context are the engine's to check.
    """
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(
            f"sampling parameters are a SamplingParams, got {type(params).__name__} {shown(params)}",
            param="sampling_params",
        )
    _check_counts(params, min(max_logprobs, vocab_size))
    _check_numbers(params)
    params = replace(
        params,
        stop=_stops(params.stop),
        stop_token_ids=_token_ids("stop_token_ids", params.stop_token_ids, vocab_size) or (),
        logit_bias=_logit_bias(params.logit_bias, vocab_size),
        allowed_token_ids=_token_ids("allowed_token_ids", params.allowed_token_ids, vocab_size),
    )
    _check_allowed(params, eos_token_ids)
    return params


def stop_strings(params: SamplingParams) -> tuple[str, ...]:
    """`params.stop` as a tuple, whether it was given as one string or several."""
    return (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)


def as_integer(value: object) -> int | None:
    """A plain integer from whatever is one (numpy's too), None from anything else; booleans are not integers."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):  # arrays have the method and refuse
        return None


def as_token_ids(value: object) -> list[int] | None:
    """Plain integers from a list, tuple or array of integers; None if it is anything else, text and bytes included."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping | Set) or not isinstance(value, Iterable):
        return None
    ids = [as_integer(token) for token in value] if isinstance(value, Sized) else [None]
    return None if None in ids else ids  # type: ignore[return-value]


def check_text(text: str, param: str) -> None:
    """Refuse text that is no Unicode (half of a surrogate pair), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{param} holds {text[error.start : error.end][:4]!r} at character {error.start}, which is not valid Unicode; "
            "remove it, or decode the text with errors='replace'",
            param=param,
        ) from error


def check_salt(salt: object) -> str:
    """A cache salt as the engine takes it; None is none. Raises InvalidRequestError."""
    if salt is None:
        return ""
    if not isinstance(salt, str) or len(salt) > MAX_SALT_CHARS:
        got = f"has {len(salt)} characters" if isinstance(salt, str) else f"= {shown(salt)}"
        raise InvalidRequestError(
            f"cache_salt {got}: it must be a text of at most {MAX_SALT_CHARS} characters, or None", param="cache_salt"
        )
    check_text(salt, "cache_salt")
    return salt


def shown(value: object, max_chars: int = 60) -> str:
    """A value for a message, short whatever it is."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= max_chars else text[:max_chars] + "..."


def _refuse(field: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} = {shown(value)} is not possible: it must be {allowed}", param=field)


def _integer(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _refuse(field, value, f"an integer from {low} to {high}")


def _number(field: str, value: object, low: float, high: float, *, is_low_open: bool = False) -> None:
    # A comparison refuses NaN and infinities too, and does not overflow on integers that no float holds.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (is_low_open and value == low):  # type: ignore[operator]
        bounds = f"above {low:g}" if is_low_open else f"at least {low:g}"
        raise _refuse(field, value, f"a finite number, {bounds} and at most {high:g}")


def _check_counts(params: SamplingParams, max_logprobs: int) -> None:
    _integer("n", params.n, 1, MAX_N)
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 1, _INT32_MAX)
    _integer("min_tokens", params.min_tokens, 0, _INT32_MAX)
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
    for field in _BOOLS:
        if not isinstance(getattr(params, field), bool):
            raise _refuse(field, getattr(params, field), "True or False")


def _check_numbers(params: SamplingParams) -> None:
    _number("temperature", params.temperature, 0.0, 2.0)
    if 0 < params.temperature < MIN_TEMPERATURE:
        raise _refuse("temperature", params.temperature, f"0 (greedy), or from {MIN_TEMPERATURE:g} to 2")
    _number("top_p", params.top_p, 0.0, 1.0, is_low_open=True)
    _integer("top_k", params.top_k, -1, _INT32_MAX)
    _number("min_p", params.min_p, 0.0, 1.0)
    _number("repetition_penalty", params.repetition_penalty, *REPETITION_PENALTIES)
    _number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _number("presence_penalty", params.presence_penalty, -2.0, 2.0)


def _stops(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        raise _refuse("stop", given, "a string or a list of strings")
    stops = (given,) if isinstance(given, str) else tuple(given)
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop has {len(stops)} strings; it must be at most {MAX_STOP_STRINGS}", param="stop")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise _refuse("stop", stop, "strings that are not empty")
        check_text(stop, "stop")
    return stops


def _token_ids(field: str, given: object, vocab_size: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise _refuse(field, given, "a list of token ids")
    return tuple(_token_id(field, token, vocab_size) for token in given)


def _token_id(field: str, given: object, vocab_size: int) -> int:
    token = as_integer(given)
    if token is None or not 0 <= token < vocab_size:
        raise _refuse(field, given, f"a token id from 0 to {vocab_size - 1}")
    return token


def _logit_bias(given: Any, vocab_size: int) -> dict[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise _refuse("logit_bias", given, "a mapping of token ids to numbers")
    if len(given) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(
            f"logit_bias has {len(given)} entries; it must be at most {MAX_LOGIT_BIAS}", param="logit_bias"
        )
    taken: dict[int, float] = {}
    for key, value in given.items():
        token = _token_id("logit_bias", key, vocab_size)
        _number(f"logit_bias[{token}]", value, -100.0, 100.0)
        taken[token] = float(value)
    return taken


def _check_allowed(params: SamplingParams, eos_token_ids: frozenset[int]) -> None:
    if params.allowed_token_ids is None:
        return
    if not params.allowed_token_ids:
        raise _refuse("allowed_token_ids", [], "None, or a list with at least one token id")
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
    if params.min_tokens > 0 and set(params.allowed_token_ids) <= stops:
        raise InvalidRequestError(
            f"min_tokens = {params.min_tokens} forbids the tokens that end a sequence, and allowed_token_ids permits nothing else; "
            "lower min_tokens to 0 or allow another token",
            param="allowed_token_ids",
        )
