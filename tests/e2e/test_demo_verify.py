"""`xllm verify` on real weights: quick in every run, whole at night."""

from __future__ import annotations

import pytest

from xllm_core.testing.verify import QUICK, Verifier

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("dtype", ["float32", "bfloat16"])]


def test_quick_matrix(demo_model: str, dtype: str) -> None:
    """`xllm verify --quick` on real weights."""
    report = Verifier(demo_model, dtype=dtype, scale=QUICK, num_blocks=256).run()
    assert report.has_passed, [
        (row.feature, row.differences, row.activity) for row in report.rows if not row.has_passed
    ]


@pytest.mark.nightly
def test_full_matrix(demo_model: str, dtype: str) -> None:
    """`xllm verify`: 16 prompts of 1 to 600 tokens, 64 new, greedy and seeded."""
    report = Verifier(demo_model, dtype=dtype, num_blocks=4096).run(on_row=print)
    assert report.has_passed, [
        (row.feature, row.differences, row.activity) for row in report.rows if not row.has_passed
    ]
