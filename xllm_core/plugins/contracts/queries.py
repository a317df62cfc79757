"""What assembly asks of a part: one frozen query per kind. It is matched against the data of a spec, then handed to the spec's own `check`.

A query that gains a field asks for more than older specs declare, so they are rejected and never asked for what they do not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xllm_core.plugins.contracts.attention import AttentionGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionQuery:
    """A kernel for one KV group, for prefill and decode alike: a batch is ragged and has rows of both."""

    device_kind: str
    geometry: AttentionGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class OpQuery:
    """An implementation of an op. kv_layout: of the cache that it may have to store into."""

    op: str
    device_kind: str
    dtype: str
    kv_layout: str = "BSGD"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelQuery:
    """A family for an architecture. config: the model's config.json."""

    architecture: str
    device_kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerQuery:
    """A sampler."""

    device_kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KVStoreQuery:
    """A store for blocks of this size and layout, as they lie on this device."""

    device_kind: str
    kv_layout: str
    block_size: int
