"""What a family's attention and cache become in one engine. Whoever decides and whoever builds what another decided find the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_core.plugins.contracts.attention import AttentionGeometry
from xllm_core.plugins.contracts.kv import KVGroupSpec
from xllm_core.plugins.contracts.model import ModelFamily
from xllm_core.plugins.plan import AssemblyPlan


def geometry_of(
    entries: Mapping[str, Mapping[str, Any]], *, block_size: int, dtype: str, kv_layout: str, kv_dtype: str | None
) -> dict[str, AttentionGeometry]:
    """What a family says of its attention, per KV group, in a cache of such blocks."""
    common: dict[str, Any] = {"block_size": block_size, "dtype": dtype, "layout": kv_layout, "kv_dtype": kv_dtype}
    return {name: AttentionGeometry(**common, **entry) for name, entry in entries.items()}


def kv_groups_of(family: ModelFamily, config: Mapping[str, Any], plan: AssemblyPlan) -> tuple[KVGroupSpec, ...]:
    """The KV groups of a family; those that attend hold what the plan says."""
    groups = family.kv_groups(config, plan.dtype)
    return tuple(
        group.in_int8() if plan.kv_dtype == "int8" and group.name in plan.geometry else group for group in groups
    )
