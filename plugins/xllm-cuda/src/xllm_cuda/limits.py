"""What the kernels cannot do, asked before anything of them is imported."""

from __future__ import annotations

from xllm_core.plugins import AttentionQuery
from xllm_cuda.tiling import MAX_GROUP, MAX_HEAD_SIZE


def check_attention(query: AttentionQuery) -> str | None:
    """Why the attention kernel cannot serve a geometry that fits its spec, or None."""
    geometry = query.geometry
    if geometry.head_size > MAX_HEAD_SIZE:
        return f"head_size {geometry.head_size}: a tile of more than {MAX_HEAD_SIZE} elements does not fit on the chip"
    group = geometry.num_heads // geometry.num_kv_heads
    if group > MAX_GROUP:
        return f"{group} heads share a KV head: a tile takes {MAX_GROUP}"
    return None
