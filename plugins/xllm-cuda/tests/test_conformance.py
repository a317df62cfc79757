"""The conformance kit on the shim: kernels run for real, interpreted. What an hour of it would prove is cut to a minute; the rest is nightly."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_core.testing import ConformanceReport, check_plugin

# Head sizes a power of two and not, blocks that no step of keys divides: every feature, dtype and geometry of heads.
SOME = {
    "static": ("-k", "test_static"),
    "ops": ("-k", "test_op"),
    "attention": ("-k", "test_attention and (undeclared or (D16-S5- and (float32 or soft_cap)))"),
    "sampler": ("-k", "test_sampler and (triton-all or equal or (reference_s and min_p))"),
}
PARTS = {
    "ops": ["op cuda/add_rms_norm", "op cuda/block_copy", "op cuda/embedding", "op cuda/kv_write", "op cuda/linear", "op cuda/rms_norm",
            "op cuda/rope", "op cuda/rope_kv_write", "op cuda/silu_mul"],
    "attention": ["attention cuda/triton"],
    "sampler": ["sampler cuda/triton"],
    "static": ["static"],
}  # fmt: skip

NOT_HERE = (
    "gives memory its pages at once",
    "does not promise rows",
    "it moves values",
    "not in bfloat16",
    "no plans for rows of any length that stay in place",
)


def check(report: ConformanceReport, parts: list[str], least: int) -> None:
    """Each part was proven so many times at least, and nothing failed. What was skipped are promises that the device does not give."""
    assert report.ok, report.text
    for name in parts:
        component = report.component(name)
        assert component.failed == 0 and component.passed >= least, f"{name}: {component}\n{report.text}"
        for reason in component.skips:
            assert any(words in reason for words in NOT_HERE), reason


@pytest.mark.slow
@pytest.mark.parametrize("suite", SOME)
def test_conformance(suite: str, tmp_path: Path) -> None:
    """float32 and float16, with splits so short that most rows are merged from several. Killed by: any kernel that computes something else."""
    config = tmp_path / "xllm.toml"
    config.write_text("[plugin.cuda]\nkv_split_tokens = 16\n")
    check(check_plugin("cuda", config=config, arguments=SOME[suite]), PARTS[suite], least=2)


@pytest.mark.nightly
@pytest.mark.parametrize("kv_split_tokens", [16, 512])
def test_conformance_whole(kv_split_tokens: int, tmp_path: Path) -> None:
    """Everything that the kit has, over the whole grid."""
    config = tmp_path / "xllm.toml"
    config.write_text(f"[plugin.cuda]\nkv_split_tokens = {kv_split_tokens}\n")
    report = check_plugin("cuda", config=config, arguments=("-k", "not test_device"))
    check(report, [name for names in PARTS.values() for name in names], least=3)
    assert report.component("attention cuda/triton").passed > 150, report.text
