"""What xllm-cuda offers. Names only: neither torch nor triton is imported before the device is chosen."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import AttentionSpec, PluginContext, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="cuda", xllm_api=">=0.1", config="xllm_cuda.settings:PluginTable")

_CUDA = frozenset({"cuda"})
_DTYPES = frozenset({"float32", "float16", "bfloat16"})
_NEEDS = ("triton",)


@hookimpl
def xllm_attention(ctx: PluginContext) -> Iterable[AttentionSpec]:
    """Paged ragged attention."""
    yield AttentionSpec(
        name="triton", target="xllm_cuda.attention:TritonAttention", rank=50, requires=_NEEDS, devices=_CUDA, dtypes=_DTYPES,
        features=frozenset({"sliding_window", "soft_cap"}), options=ctx.settings,
        summary="paged, ragged, GQA packed, split over KV",
    )  # fmt: skip
