"""Qwen2, Qwen2.5 (biases on queries, keys and values) and Qwen3 dense (a norm on each query and key head instead).

Source: arXiv:2407.10671, arXiv:2505.09388. Field names and defaults are those of transformers' Qwen2Config and Qwen3Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_core.models.config import Fields, shown
from xllm_core.models.dense import DenseConfig, DenseFamily, read_dense


class Qwen2(DenseFamily):
    """`contracts.model.ModelFamily` for Qwen2ForCausalLM."""

    def read(self, config: Mapping[str, Any]) -> DenseConfig:
        """The configuration, checked."""
        return read_dense(config, "Qwen2ForCausalLM", has_qkv_bias=True, **_window(Fields(config)))


class Qwen3(DenseFamily):
    """`contracts.model.ModelFamily` for Qwen3ForCausalLM."""

    def read(self, config: Mapping[str, Any]) -> DenseConfig:
        """The configuration, checked. transformers gives a missing head_dim 128, whatever the hidden size."""
        fields = Fields(config)
        has_bias = fields.flag("attention_bias", False)
        return read_dense(
            config,
            "Qwen3ForCausalLM",
            head_size=fields.integer("head_dim", 128),
            has_qk_norm=True,
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            **_window(fields),
        )


def _window(fields: Fields) -> dict[str, Any]:
    """The sliding window and its layers: those that `layer_types` names, else the ones from `max_window_layers` on."""
    num_layers = fields.num_layers()
    if not fields.flag("use_sliding_window", False) or (
        "sliding_window" in fields and fields.get("sliding_window") is None
    ):
        if "sliding_attention" in (fields.get("layer_types") or ()):
            raise fields.error(
                "layer_types", "names sliding layers, but the window is off (use_sliding_window, sliding_window)"
            )
        return {}
    window = fields.integer("sliding_window", 4096)
    layer_types = fields.get("layer_types")
    if layer_types is None:
        layers = range(min(fields.integer("max_window_layers", 28, minimum=0), num_layers), num_layers)
        return {"window": window, "window_layers": frozenset(layers)}
    known = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not set(layer_types) <= set(known):
        raise fields.error("layer_types", f"is {shown(layer_types)}; needed are {num_layers} times one of {known}")
    sliding = frozenset(layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention")
    return {"window": window, "window_layers": sliding}
