"""Tiny random GLMs, written by transformers, which also is their oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_core.testing.tiny import tiny_config, write_tiny

ARCHITECTURES = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM", "moe": "Glm4MoeForCausalLM"}
# Every option of the router and of attention on, behind one layer without experts.
MOE = {
    "num_hidden_layers": 3, "use_qk_norm": True, "attention_bias": True, "head_dim": 16, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "routed_scaling_factor": 1.7,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny("glm4", **overrides) -> the directory of a random model, written once per session. None takes a field away."""
    made: dict[str, Path] = {}

    def make(kind: str, **overrides: Any) -> Path:
        key = repr((kind, sorted(overrides.items())))
        if key not in made:
            fields = {**(MOE if kind == "moe" else {}), **overrides}
            fields = {name: value for name, value in fields.items() if value is not None}
            made[key] = write_tiny(tiny_config(ARCHITECTURES[kind], **fields), tmp_path_factory.mktemp(kind) / "model")
        return made[key]

    return make
