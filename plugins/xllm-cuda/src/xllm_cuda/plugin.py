"""What xllm-cuda offers. Names only: neither torch nor triton is imported before the device is chosen."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import (
    CORE_FUSIONS,
    AttentionSpec,
    DeviceSpec,
    OpSpec,
    PluginContext,
    PluginInfo,
    SamplerSpec,
    hookimpl,
)

xllm_plugin = PluginInfo(id="cuda", xllm_api=">=0.1", config="xllm_cuda.settings:PluginTable")

_CUDA = frozenset({"cuda"})
_DTYPES = frozenset({"float32", "float16", "bfloat16"})
_TRITON = ("triton",)
_LAYOUTS = frozenset({"BSGD"})
"""What the kernels that store into the cache know."""


@hookimpl
def xllm_devices() -> Iterable[DeviceSpec]:
    """One NVIDIA GPU."""
    yield DeviceSpec(
        name="cuda",
        target="xllm_cuda.device:CudaDevice",
        rank=50,
        probe="xllm_cuda.probe:probe",
        is_accelerator=True,
        summary="an NVIDIA GPU of compute capability 8.0 or newer",
    )


@hookimpl
def xllm_ops() -> Iterable[OpSpec]:
    """Triton kernels, and torch's own where they are as good."""
    kernels = {
        "rms_norm": "RmsNorm", "add_rms_norm": "AddRmsNorm", "rope": "Rope", "silu_mul": "SiluMul", "kv_write": "KvWrite",
        "block_copy": "BlockCopy", "rope_kv_write": "RopeKvWrite",
    }  # fmt: skip
    for op, name in kernels.items():
        yield OpSpec(
            name=op, op=op, target=f"xllm_cuda.ops:{name}", rank=50, requires=_TRITON, devices=_CUDA, dtypes=_DTYPES,
            replaces=CORE_FUSIONS.get(op, ()), layouts=_LAYOUTS if "kv_write" in op else frozenset(), summary="a Triton kernel",
        )  # fmt: skip
    for op, name in {"linear": "Linear", "embedding": "Embedding"}.items():
        yield OpSpec(
            name=op,
            op=op,
            target=f"xllm_cuda.linear:{name}",
            rank=50,
            devices=_CUDA,
            dtypes=_DTYPES,
            summary="torch's own",
        )


@hookimpl
def xllm_attention(ctx: PluginContext) -> Iterable[AttentionSpec]:
    """Paged ragged attention."""
    yield AttentionSpec(
        name="triton", target="xllm_cuda.attention:TritonAttention", rank=50, requires=_TRITON, check="xllm_cuda.limits:check_attention",
        devices=_CUDA, dtypes=_DTYPES, features=frozenset({"sliding_window", "soft_cap"}), options=ctx.settings,
        summary="paged, ragged, heads of a group packed, split over keys",
    )  # fmt: skip


@hookimpl
def xllm_samplers() -> Iterable[SamplerSpec]:
    """Token choice in one launch."""
    yield SamplerSpec(
        name="triton", target="xllm_cuda.sampler:TritonSampler", rank=50, requires=_TRITON, devices=_CUDA,
        summary="filters as thresholds, without a sort",
    )  # fmt: skip
