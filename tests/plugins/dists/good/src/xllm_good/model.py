"""A family under a name of its own, with Llama's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xllm_core.models.llama import Llama
from xllm_core.plugins import KVGroupSpec, Model, ModelShape, Parts, WeightMap


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "architectures": ["LlamaForCausalLM"]}


class Toy:
    """A `ModelFamily`."""

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """Llama's, renamed."""
        return replace(Llama().shape(_llama(config)), architecture="ToyForCausalLM")

    def kv_groups(self, config: Mapping[str, Any], kv_dtype: str) -> Sequence[KVGroupSpec]:
        """Llama's."""
        return Llama().kv_groups(_llama(config), kv_dtype)

    def attention(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Llama's."""
        return Llama().attention(_llama(config))

    def weight_map(self, config: Mapping[str, Any]) -> WeightMap:
        """Llama's."""
        return Llama().weight_map(_llama(config))

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        """Llama's."""
        return Llama().build(_llama(config), parts)
