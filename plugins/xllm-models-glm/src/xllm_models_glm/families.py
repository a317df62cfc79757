"""The three families: which configuration each reads. Shapes, cache, weights and model follow from that.

GlmForCausalLM (GLM-4-9B of 2024) turns neighbouring elements of the first half of each head. Glm4ForCausalLM (GLM-4-0414, Z1) adds norms after
attention and MLP. Glm4MoeForCausalLM (GLM-4.5 to 4.7) turns half-split pairs, and has experts. Source: arXiv:2406.12793, arXiv:2508.06471.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from xllm_core.plugins import MODEL_OPS, KVGroupSpec, Model, ModelShape, Parts, WeightMap
from xllm_models_glm.configuration import GROUP, GlmConfig, read_glm, read_glm_moe
from xllm_models_glm.weights import weight_map


class GlmFamily(ABC):
    """`ModelFamily` for whatever reads as a `GlmConfig`."""

    @abstractmethod
    def read(self, config: Mapping[str, Any]) -> GlmConfig:
        """The configuration, checked; ModelFormatError names the field that cannot be served."""

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """What the core must know."""
        return self.read(config).shape()

    def kv_groups(self, config: Mapping[str, Any], kv_dtype: str) -> Sequence[KVGroupSpec]:
        """The cache it needs."""
        return self.read(config).kv_groups(kv_dtype)

    def attention(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """What a kernel is chosen by."""
        return {GROUP: self.read(config).geometry()}

    def weight_map(self, config: Mapping[str, Any]) -> WeightMap:
        """Every tensor and its axis."""
        return weight_map(self.read(config))

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        """The model; imports torch."""
        from xllm_models_glm.layers import Decoder

        return Decoder(self.read(config), parts)


class Glm(GlmFamily):
    """GlmForCausalLM."""

    def read(self, config: Mapping[str, Any]) -> GlmConfig:
        """The configuration, checked."""
        return read_glm(config, "GlmForCausalLM", has_post_norms=False)


class Glm4(GlmFamily):
    """Glm4ForCausalLM."""

    def read(self, config: Mapping[str, Any]) -> GlmConfig:
        """The configuration, checked."""
        return read_glm(config, "Glm4ForCausalLM", has_post_norms=True)


class Glm4Moe(GlmFamily):
    """Glm4MoeForCausalLM."""

    def read(self, config: Mapping[str, Any]) -> GlmConfig:
        """The configuration, checked."""
        return read_glm_moe(config)

    def ops(self, config: Mapping[str, Any]) -> Sequence[str]:
        """The router's and the experts'."""
        return MODEL_OPS
