"""A tiny model on the plugin's kernels, interpreted, behind the shim: the reference's tokens, and the matrix of `xllm verify` in small."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_core.testing.across import compare_with_reference
from xllm_core.testing.tiny import tiny_config, write_tiny
from xllm_core.testing.verify import ROWS, Scale, Verifier

SCALE = Scale((7, 24), 8)
USE = {"device": "cuda-shim/cuda-shim"}
SOME = ("prefix cache", "preemption", "overlap, stops", "graph replay")
TOO_LONG = "chunk 64"  # forces pieces of 64 tokens, and no prompt here is that long


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer, grouped heads, logits spread wide enough that near ties are rare."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny_config(
        "Qwen3ForCausalLM", hidden_size=64, num_hidden_layers=1, initializer_range=0.5, max_position_embeddings=64
    )
    return str(write_tiny(config, path))


def verify(model: str, rows: tuple[str, ...]) -> Any:
    """With splits of 16 keys, so that rows are merged from several."""
    settings: dict[str, Any] = {"memory_bytes": 1 << 22, "block_size": 4, "plugin": {"cuda": {"kv_split_tokens": 16}}}
    return Verifier(model, dtype="float32", scale=SCALE, use=USE, **settings).run(only=rows)


@pytest.mark.slow
def test_tokens_are_the_reference_s(model: str) -> None:
    """Greedy and seeded, in float32. Killed by: any kernel that computes something else, and by an engine that took the reference's parts."""
    row = compare_with_reference(model, USE, scale=SCALE)
    assert row.has_passed and row.num_compared == row.num_tokens == 4 * SCALE.new_tokens, row


@pytest.mark.slow
def test_every_part_is_the_plugin_s(model: str) -> None:
    """Assembly takes our kernels for every op, for attention and for sampling. Killed by: a spec that fits nothing."""
    verifier = Verifier(model, dtype="float32", scale=SCALE, use=USE, memory_bytes=1 << 22)
    built = verifier.begin()
    verifier.close()
    assert {type(op).__module__ for op in built.loaded.ops.values()} == {"xllm_cuda.ops", "xllm_cuda.linear"}
    assert "rope_kv_write" in built.loaded.ops
    assert type(built.worker._runner._sampler).__module__ == "xllm_cuda.sampler"
    assert {type(kernel).__module__ for kernel in built.loaded.kernels.values()} == {"xllm_cuda.attention"}


@pytest.mark.slow
def test_features_change_no_token(model: str) -> None:
    """Prefix hits, preemption, steps planned ahead, and decode steps over plans that stay in place. Killed by: a slot written wrongly, a block
    copied too late, a plan that keeps something of the step before.
    """
    report = verify(model, SOME)
    assert report.has_passed and len(report.rows) == len(SOME), report.rows
    assert not any(row.not_applicable for row in report.rows), report.rows


@pytest.mark.nightly
def test_the_whole_matrix(model: str) -> None:
    """Every row but one."""
    report = verify(model, tuple(name for name in ROWS if name != TOO_LONG))
    assert report.has_passed and len(report.rows) == len(ROWS) - 1, report.rows
