"""A tiny model end to end on the soft device: torch_npu's host code in every call, reference numbers behind its operators."""

from __future__ import annotations

from typing import Any

import pytest
from xllm_ascend_soft.activate import launched

from xllm_core.testing.across import compare_with_reference
from xllm_core.testing.tiny import tiny_config, write_tiny
from xllm_core.testing.verify import QUICK, ROWS, Verifier

USE = {"device": "ascend/npu"}
SOME = ("batch mates", "prefix cache", "preemption", "overlap, stops")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers with norms of heads, grouped heads, logits spread wide enough that near ties are rare."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    return str(write_tiny(tiny_config("Qwen3ForCausalLM", hidden_size=64, initializer_range=0.5), path))


def verify(model: str, rows: tuple[str, ...]) -> Any:
    """In bfloat16, which is what the device has."""
    return Verifier(model, dtype="bfloat16", scale=QUICK, use=USE, memory_bytes=1 << 24).run(only=rows)


@pytest.mark.slow
def test_tokens_are_the_reference_s(model: str) -> None:
    """Greedy and seeded; every fused kernel of CANN was launched on the way, and no other of that kind. Killed by: any call of ours that asks for
    something else, and by an engine that took the reference's parts.
    """
    launched()
    row = compare_with_reference(model, USE, dtype="bfloat16")
    assert row.has_passed and row.num_compared == row.num_tokens == 8 * QUICK.new_tokens, row
    assert set(launched()) == {
        "aclnnFusedInferAttentionScoreV2", "aclnnScatterPaKvCache", "aclnnRotaryPositionEmbeddingV2", "aclnnAddRmsNorm", "aclnnRmsNorm",
        "aclnnSwiGlu",
    }  # fmt: skip


@pytest.mark.slow
def test_every_part_is_the_plugin_s(model: str) -> None:
    """Assembly takes our parts, in blocks of 128. Killed by: a spec that fits nothing."""
    verifier = Verifier(model, dtype="bfloat16", scale=QUICK, use=USE, memory_bytes=1 << 24)
    built = verifier.begin()
    verifier.close()
    assert {type(op).__module__ for op in built.loaded.ops.values()} == {"xllm_ascend.fused", "xllm_ascend.plain"}
    assert {type(kernel).__module__ for kernel in built.loaded.kernels.values()} == {"xllm_ascend.attention"}
    assert {kernel._geometry.block_size for kernel in built.loaded.kernels.values()} == {128}


@pytest.mark.slow
def test_features_change_no_token(model: str) -> None:
    """Batches, prefix hits of whole blocks of 128, preemption and steps planned ahead. Killed by: a slot written wrongly, a block copied late."""
    report = verify(model, SOME)
    assert report.has_passed and len(report.rows) == len(SOME), report.rows
    assert not any(row.not_applicable for row in report.rows)


@pytest.mark.nightly
def test_the_whole_matrix(model: str) -> None:
    """Every row."""
    report = verify(model, tuple(ROWS))
    assert report.has_passed, report.rows
    without = {row.feature for row in report.rows if row.not_applicable}
    assert without <= {"log probabilities", "plugin's store", "graph replay"}
