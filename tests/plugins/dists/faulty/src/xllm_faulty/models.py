"""Families with a fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xllm_core.models.llama import Llama
from xllm_core.plugins import Model, Parts, WeightMap


class WrongEps(Llama):
    """Takes the norm's epsilon for a hundredth."""

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        return super().build({**config, "rms_norm_eps": 0.01}, parts)


class WrongAxis(Llama):
    """Cuts the row-parallel weight of the attention's output along columns, in its map and for its parts alike."""

    def weight_map(self, config: Mapping[str, Any]) -> WeightMap:
        honest = super().weight_map(config)
        entries = [replace(e, axis="column") if e.param.endswith("layers.0.down.weight") else e for e in honest.entries]
        return replace(honest, entries=entries)

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        declare = parts._new_parameter  # type: ignore[attr-defined]
        parts._new_parameter = lambda name, shape, axis: declare(  # type: ignore[attr-defined]
            name, shape, "column" if name == "layers.0.down.weight" else axis
        )
        return super().build(config, parts)
