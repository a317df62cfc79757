"""Llama (1 to 3.x, SmolLM2 and everything else that calls itself LlamaForCausalLM), and Mistral, which adds a sliding window.

Source: Llama 3, arXiv:2407.21783; Mistral 7B, arXiv:2310.06825. Field names and defaults are those of transformers' LlamaConfig and
MistralConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_core.models.config import Fields
from xllm_core.models.dense import DenseConfig, DenseFamily, read_dense


class Llama(DenseFamily):
    """`contracts.model.ModelFamily` for LlamaForCausalLM."""

    def read(self, config: Mapping[str, Any]) -> DenseConfig:
        """The configuration, checked."""
        fields = Fields(config)
        has_attention_bias = fields.flag("attention_bias", False)
        return read_dense(
            config,
            "LlamaForCausalLM",
            has_qkv_bias=has_attention_bias,
            has_output_bias=has_attention_bias,
            has_mlp_bias=fields.flag("mlp_bias", False),
        )


class Mistral(DenseFamily):
    """`contracts.model.ModelFamily` for MistralForCausalLM: every layer sees the last `sliding_window` tokens, or all if that is null."""

    def read(self, config: Mapping[str, Any]) -> DenseConfig:
        """The configuration, checked. A missing `sliding_window` means 4096, as it does in transformers."""
        fields = Fields(config)
        has_window = "sliding_window" not in fields or fields.get("sliding_window") is not None
        window = fields.integer("sliding_window", 4096) if has_window else None
        layers = range(fields.num_layers()) if has_window else ()
        return read_dense(config, "MistralForCausalLM", window=window, window_layers=frozenset(layers))
