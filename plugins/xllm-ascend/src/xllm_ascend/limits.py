"""What fused-infer attention cannot do, asked before anything of it is imported. Source: CANN's page of the operator."""

from __future__ import annotations

from xllm_core.plugins import AttentionQuery

MAX_HEAD_SIZE = 512
MAX_GROUP = 64


def check_attention(query: AttentionQuery) -> str | None:
    """Why the operator cannot serve a geometry that fits its spec, or None."""
    geometry = query.geometry
    if geometry.head_size % 16 or geometry.head_size > MAX_HEAD_SIZE:
        return f"head_size {geometry.head_size}: the operator takes multiples of 16 up to {MAX_HEAD_SIZE}"
    group = geometry.num_heads // geometry.num_kv_heads
    if group > MAX_GROUP:
        return f"{group} heads share a KV head: the operator takes {MAX_GROUP}"
    return None
