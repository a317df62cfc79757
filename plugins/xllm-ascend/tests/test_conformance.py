"""The conformance kit on the soft device. A part of it in the ordinary suite, the whole nightly."""

from __future__ import annotations

import pytest

from xllm_core.testing import ConformanceReport, check_plugin

SOFT = ("-p", "xllm_ascend_soft.activate")
PARTS = (
    "device ascend/npu", "op ascend/add_rms_norm", "op ascend/block_copy", "op ascend/embedding", "op ascend/kv_write", "op ascend/linear",
    "op ascend/rms_norm", "op ascend/rope", "op ascend/silu_mul", "attention ascend/fused-infer",
)  # fmt: skip

NOT_HERE = (
    "gives memory its pages at once",
    "computes while the host waits",
    "promise rows",
    "records no graphs",
    "no plans that stay in place",
    "no plans for rows of any length that stay in place",
    "moves values",
)


def check(report: ConformanceReport, parts: tuple[str, ...]) -> None:
    """Each part was proven, and nothing failed. What was skipped are promises that the device does not give."""
    assert report.ok, report.text
    for name in parts:
        component = report.component(name)
        assert component.failed == 0 and component.passed >= 3, f"{name}: {component}\n{report.text}"
        for reason in component.skips:
            assert any(words in reason for words in NOT_HERE), reason


@pytest.mark.slow
def test_conformance() -> None:
    """All ops, attention over the whole grid, the device but for what test_engine runs. Killed by: a call of ours that asks for something else."""
    some = "test_static or test_op or test_attention or (test_device and not features and not tokens)"
    check(check_plugin("ascend", require_device=True, arguments=(*SOFT, "-k", some)), PARTS)


@pytest.mark.nightly
def test_conformance_whole() -> None:
    """Everything that the kit has, over the whole grid, `xllm verify` with it."""
    check(check_plugin("ascend", require_device=True, arguments=SOFT), PARTS)
