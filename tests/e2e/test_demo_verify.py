"""`xllm verify` on real weights: quick in every run, whole at night, on the device that is chosen by itself and on the reference."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_core.testing.verify import QUICK, Scale, Verifier

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("dtype", ["float32", "bfloat16"])]


def test_quick_matrix(demo_model: str, dtype: str) -> None:
    """`xllm verify --quick` on real weights."""
    check(Verifier(demo_model, dtype=dtype, scale=QUICK, num_blocks=256))


@pytest.mark.nightly
def test_full_matrix(demo_model: str, dtype: str) -> None:
    """`xllm verify`: 16 prompts of 1 to 600 tokens, 64 new, greedy and seeded."""
    check(Verifier(demo_model, dtype=dtype, num_blocks=4096))


@pytest.mark.nightly
@pytest.mark.parametrize("quantization", ["int8", "gguf"])
def test_full_matrix_of_quantised_weights(demo_model: str, dtype: str, quantization: str) -> None:
    """`xllm verify --quantization ...`: 8 bits for each weight, and the file's own blocks."""
    check(Verifier(demo_model, dtype=dtype, num_blocks=4096, quantization=quantization))


@pytest.mark.nightly
def test_full_matrix_of_a_cache_in_8_bits(demo_model: str, dtype: str) -> None:
    """`xllm verify --kv-cache-dtype int8`."""
    check(Verifier(demo_model, dtype=dtype, num_blocks=4096, kv_cache_dtype="int8"))


@pytest.mark.nightly
def test_full_matrix_of_the_reference(demo_model: str, dtype: str) -> None:
    """The same where rows feel their neighbours and near ties are excused, at a fifth of the scale: whole, it takes an hour for each dtype."""
    scale = Scale((1, 15, 16, 17, 33, 64, 150, 600), 24)
    check(Verifier(demo_model, dtype=dtype, scale=scale, num_blocks=4096, device="core/reference"))


def check(verifier: Any) -> None:
    report = verifier.run(on_row=print)
    assert report.has_passed, [
        (row.feature, row.differences, row.activity) for row in report.rows if not row.has_passed
    ]
