"""Rotary frequencies against transformers' own functions, to the bit, at real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from xllm_core.models.llama import Llama
from xllm_core.models.rope import Rotary, inverse_frequencies
from xllm_core.plugins.contracts.model import ForwardContext

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, bare": {"rope_type": "yarn", "factor": 4.0},
    "yarn, betas": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0, "original_max_position_embeddings": 4096},
    "yarn, own attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.1, "original_max_position_embeddings": 4096},
    "yarn, not truncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "original_max_position_embeddings": 4096},
}  # fmt: skip


def config_of(scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str) -> None:
    """Killed by: any other formula, or the same in float64 (bits differ, and grow with the position)."""
    config = config_of(SCALINGS[name])
    kind = SCALINGS[name]["rope_type"]
    theirs = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    expected, expected_scale = theirs(config)
    ours, scale = inverse_frequencies(Llama().read(config.to_dict()).rope)
    assert scale == pytest.approx(expected_scale, rel=1e-12)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["default", "yarn", "llama3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_waves_at_far_positions(name: str, dtype: torch.dtype) -> None:
    """cos and sin of positions up to 131,071, and worked out once per step. Killed by: angles in bfloat16, a forgotten factor, a stale memo."""
    config = config_of(SCALINGS[name])
    positions = torch.tensor([0, 1, 77, 8191, 131071])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])
    rotary = Rotary(Llama().read(config.to_dict()).rope, dtype, "cpu")
    context = ForwardContext(positions, {}, {})
    for ours, theirs in zip(rotary(context), expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs[0])
    assert rotary(context)[0] is rotary(context)[0]
    assert not torch.equal(rotary(ForwardContext(positions + 1, {}, {}))[0], rotary(context)[0])


def test_explicit_factors() -> None:
    """GGUF's own kind: default frequencies divided one by one. Killed by: multiplying, ignoring them."""
    config = config_of({"rope_type": "default"}).to_dict()
    factors = [1.0 + index for index in range(64)]
    plain, _ = inverse_frequencies(Llama().read(config).rope)
    config["rope_parameters"] = {"rope_type": "factors", "factors": factors, "rope_theta": 500000.0}
    ours, scale = inverse_frequencies(Llama().read(config).rope)
    assert scale == 1.0
    assert torch.equal(ours, plain / torch.tensor(factors))
