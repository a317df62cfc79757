"""What fused-infer attention cannot do, asked before anything of it is imported.

Source: CANN's page of aclnnFusedInferAttentionScore for layout TND over a paged cache [block, slot, heads * elements], without rope inputs.
"""

from __future__ import annotations

from xllm_core.plugins import AttentionQuery

MAX_HEAD_SIZE = 256
UNGROUPED_HEAD_SIZES = (64, 128)
"""Where every head has keys of its own, the operator takes these only."""

MAX_HEADS = 256
MAX_GROUP = 64
MAX_SLOT_ELEMENTS = 65535
"""Elements of all KV heads of one token."""


def check_attention(query: AttentionQuery) -> str | None:
    """Why the operator cannot serve a geometry that fits its spec, or None."""
    geometry = query.geometry
    size, group = geometry.head_size, geometry.num_heads // geometry.num_kv_heads
    if geometry.num_heads > MAX_HEADS:
        return f"{geometry.num_heads} heads: the operator takes {MAX_HEADS}"
    if group > MAX_GROUP:
        return f"{group} heads share a KV head: the operator takes {MAX_GROUP}"
    if geometry.num_kv_heads * size > MAX_SLOT_ELEMENTS:
        return (
            f"{geometry.num_kv_heads * size} elements of a token in the cache: the operator takes {MAX_SLOT_ELEMENTS}"
        )
    if size % 16 or size > MAX_HEAD_SIZE:
        return f"head_size {size}: the operator takes multiples of 16 up to {MAX_HEAD_SIZE}"
    if group == 1 and size not in UNGROUPED_HEAD_SIZES:
        return f"head_size {size} where heads share no keys: the operator takes {' and '.join(map(str, UNGROUPED_HEAD_SIZES))}"
    return None
