"""Every field that can be wrong is refused by name, with its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from xllm_core.errors import InvalidRequestError
from xllm_core.frontend.validation import check_params, check_salt, shown
from xllm_core.types import SamplingParams

REFUSED: list[tuple[str, Any]] = [
    ("n", 0), ("n", -1), ("n", 129), ("n", 1.0), ("n", True), ("n", "2"),
    ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 2.5), ("min_tokens", -1),
    ("temperature", math.nan), ("temperature", math.inf), ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"),
    ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1), ("repetition_penalty", math.inf),
    ("frequency_penalty", 2.1), ("presence_penalty", -2.1), ("presence_penalty", math.nan),
    ("seed", 1 << 63), ("seed", -(1 << 63) - 1), ("seed", "a"), ("seed", 1.0),
    ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", 21), ("prompt_logprobs", True),
    ("stop", ""), ("stop", ["a", ""]), ("stop", ["x"] * 17), ("stop", [3]),
    ("stop_token_ids", [100]), ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]),
    ("logit_bias", {100: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: 101.0}), ("logit_bias", {1: math.nan}), ("logit_bias", {"1": 1.0}),
    ("logit_bias", dict.fromkeys(range(2000), 1.0)),
    ("logit_bias", [1]), ("logit_bias", 5), ("max_tokens", 1 << 31), ("max_tokens", 10**5000), ("min_tokens", 1 << 31),
    ("top_k", 1 << 31), ("temperature", 1e-6), ("temperature", 10**400), ("repetition_penalty", 1e-4), ("repetition_penalty", 1001.0),
    ("ignore_eos", 1), ("ignore_eos", None), ("skip_special_tokens", "yes"), ("include_stop_str_in_output", 0),
    ("stop", 5), ("stop", b"x"), ("stop", {"a": 1}), ("stop", ["a", None]),
    ("stop_token_ids", 5), ("stop_token_ids", "12"), ("stop_token_ids", [True]), ("allowed_token_ids", 3), ("allowed_token_ids", "a"),
    ("allowed_token_ids", []), ("allowed_token_ids", [100]), ("allowed_token_ids", [2.0]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda v: shown(v, 30))
def test_refused_with_its_name(field: str, value: Any) -> None:
    """The message names the field and says what is allowed; `param` is what a server reports."""
    with pytest.raises(InvalidRequestError) as caught:
        check_params(SamplingParams(**{field: value}), vocab_size=100)
    assert field in str(caught.value)
    assert "must be" in str(caught.value)
    assert (caught.value.param or "").startswith(field)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(), SamplingParams(temperature=0), SamplingParams(temperature=2.0, top_k=-1, top_p=1e-6, min_p=1.0),
        SamplingParams(max_tokens=None), SamplingParams(max_tokens=10**9), SamplingParams(seed=-(1 << 63)), SamplingParams(n=128),
        SamplingParams(logit_bias={0: -100, 99: 100}), SamplingParams(allowed_token_ids=[0]), SamplingParams(stop="x", logprobs=20),
    ],
)  # fmt: skip
def test_edges_are_allowed(params: SamplingParams) -> None:
    """What lies on a bound is inside."""
    assert check_params(params, vocab_size=100).n == params.n


def test_small_vocabularies_bound_logprobs() -> None:
    """More candidates than tokens exist cannot be reported. Red if only the fixed bound is checked."""
    for field in ("logprobs", "prompt_logprobs"):
        with pytest.raises(InvalidRequestError, match=rf"{field} = 6 .*from 0 to 5"):
            check_params(SamplingParams(**{field: 6}), vocab_size=5)
        check_params(SamplingParams(**{field: 5}), vocab_size=5)


def test_none_is_no_stop_and_numpy_ids_are_ids() -> None:
    """Red if None is iterated, or if only `int` passes."""
    taken = check_params(
        SamplingParams(stop=None, stop_token_ids=None),
        vocab_size=100,  # type: ignore[arg-type]
    )
    assert (taken.stop, taken.stop_token_ids) == ((), ())
    ids = np.array([3, 4])
    taken = check_params(
        SamplingParams(stop_token_ids=ids, allowed_token_ids=list(ids), logit_bias={ids[0]: 1}),  # type: ignore[arg-type]
        vocab_size=100,
    )
    assert (taken.stop_token_ids, taken.allowed_token_ids, taken.logit_bias) == ((3, 4), (3, 4), {3: 1.0})
    assert {type(token) for token in (*taken.stop_token_ids, *(taken.logit_bias or ()))} == {int}


def test_what_was_checked_is_what_is_used() -> None:
    """The caller's later changes do not reach the copy. Red if a container is shared."""
    stop, stop_ids, bias, allowed = ["x"], [1], {2: 1.0}, [3]
    taken = check_params(
        SamplingParams(stop=stop, stop_token_ids=stop_ids, logit_bias=bias, allowed_token_ids=allowed), vocab_size=100
    )
    stop.append(""), stop_ids.append(1000), bias.update({1000: 9.0}), allowed.clear()
    assert (taken.stop, taken.stop_token_ids, taken.logit_bias) == (("x",), (1,), {2: 1.0})
    assert taken.allowed_token_ids == (3,)


@pytest.mark.parametrize("given", [{"temperature": 0}, None, 5])
def test_only_sampling_params_are_sampling_params(given: Any) -> None:
    """A mapping is a likely mistake. Red if it meets an AttributeError instead."""
    with pytest.raises(InvalidRequestError, match=rf"SamplingParams, got {type(given).__name__}"):
        check_params(given, vocab_size=100)


@pytest.mark.parametrize("salt", [5, b"x", "x" * 1025, "\ud800"])
def test_salts_are_short_texts(salt: Any) -> None:
    """Red if a salt is turned into a text, or not looked at."""
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        check_salt(salt)
    assert (check_salt(None), check_salt("x" * 1024)) == ("", "x" * 1024)


def test_conflicts_name_both_sides() -> None:
    """min above max, and a minimum length with nothing left to say it in."""
    with pytest.raises(InvalidRequestError, match=r"min_tokens = 9 exceeds max_tokens = 8"):
        check_params(SamplingParams(min_tokens=9, max_tokens=8), vocab_size=100)
    with pytest.raises(InvalidRequestError, match="allowed_token_ids permits nothing else"):
        check_params(SamplingParams(min_tokens=1, allowed_token_ids=[7]), vocab_size=100, eos_token_ids=frozenset({7}))
    check_params(
        SamplingParams(min_tokens=1, allowed_token_ids=[7], ignore_eos=True),
        vocab_size=100,
        eos_token_ids=frozenset({7}),
    )
