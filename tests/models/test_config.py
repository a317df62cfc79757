"""Configurations: what cannot be served is refused by field name, and what is missing has transformers' meaning."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from xllm_core.errors import ModelError
from xllm_core.models.llama import Llama, Mistral
from xllm_core.models.qwen import Qwen2, Qwen3

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "_source": "/models/x/config.json",
}  # fmt: skip
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
    "no architecture": ({"architectures": None}, "architectures"),
    "missing size": ({"hidden_size": None}, "hidden_size"),
    "size as text": ({"hidden_size": "32"}, "hidden_size"),
    "size as a flag": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "negative size": ({"vocab_size": -1}, "vocab_size"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "odd head": ({"head_dim": 7}, "head_dim"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    "tie as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "eps not finite": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "unknown dtype": ({"torch_dtype": "float8"}, "float8"),
    "rope of an unknown kind": ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    "rope as text": ({"rope_scaling": "llama3"}, "rope_scaling"),
    "rope per layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    "rope without a number": ({"rope_parameters": {**ROPE, "factor": None}}, "rope_parameters.factor"),
    "rope with a wrong number": ({"rope_parameters": {**ROPE, "factor": 0}}, "rope_parameters.factor"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "theta as text": ({"rope_theta": "big"}, "rope_theta"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    """The message names the file and the field. Killed by: ignoring the field, a bare KeyError or TypeError."""
    changes, word = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        Llama().shape({**GOOD, **changes})
    assert word in str(caught.value)
    assert "/models/x/config.json" in str(caught.value)


def test_good_configuration_and_defaults() -> None:
    """Killed by: another default."""
    config = Llama().read(GOOD)
    assert (config.head_size, config.norm_eps, config.rope.theta, config.is_tied) == (8, 1e-6, 10000.0, False)
    assert Llama().read({**GOOD, "num_key_value_heads": None}).num_kv_heads == 4
    shape = Llama().shape(GOOD)
    assert (shape.num_layers, shape.vocab_size, shape.max_model_len) == (4, 128, 256)


def test_kv_groups_follow_the_windows() -> None:
    """Killed by: one group for all, window off by a layer, Mistral's missing field read as "no window"."""
    qwen = {
        **GOOD,
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 3,
    }
    full, window = Qwen2().kv_groups(qwen, "bfloat16")
    assert (full.kind, full.layers, full.window) == ("full", (0, 1, 2), None)
    assert (window.kind, window.layers, window.window) == ("sliding_window", (3,), 64)
    assert [tensor.shape for tensor in full.tensors] == [(2, 8), (2, 8)]
    assert Qwen2().attention(qwen)["window"]["sliding_window"] == 64
    assert [group.kind for group in Qwen2().kv_groups({**qwen, "use_sliding_window": False}, "float32")] == ["full"]
    mistral = {**GOOD, "architectures": ["MistralForCausalLM"]}
    assert [group.window for group in Mistral().kv_groups(mistral, "float32")] == [4096]
    assert [group.window for group in Mistral().kv_groups({**mistral, "sliding_window": None}, "float32")] == [None]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "layer_types": ["full_attention"]},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
        {"use_sliding_window": False, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
    ],
)
def test_layer_types_that_contradict(changes: dict[str, Any]) -> None:
    """Killed by: trusting the list unseen."""
    with pytest.raises(ModelError, match="layer_types"):
        Qwen3().shape({**GOOD, "architectures": ["Qwen3ForCausalLM"], **changes})


def test_families_describe_without_torch() -> None:
    """Shape, groups and weight map are wanted where torch is not. Killed by: a torch import at the top of a family's file."""
    code = (
        "import sys; from xllm_core.models.llama import Llama; from xllm_core.models.qwen import Qwen3\n"
        f"config = {GOOD!r}; Llama().shape(config); Llama().weight_map(config); Llama().kv_groups(config, 'float32')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
