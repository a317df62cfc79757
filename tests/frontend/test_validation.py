"""Every field that can be wrong is refused by name, with its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xllm_core.errors import InvalidRequestError
from xllm_core.frontend.validation import check_params
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
    ("allowed_token_ids", []), ("allowed_token_ids", [100]), ("allowed_token_ids", [2.0]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda v: str(v)[:30])
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
    assert check_params(params, vocab_size=100) is None


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
