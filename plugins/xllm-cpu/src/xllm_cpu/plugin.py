"""What this plugin offers. Imported at every start of xllm, so it imports nothing but `xllm_core.plugins`."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import (
    CORE_FUSIONS,
    CORE_OPS,
    MODEL_OPS,
    QUANTIZED_KV_OPS,
    QUANTIZED_OPS,
    AttentionSpec,
    DeviceSpec,
    OpSpec,
    PluginContext,
    PluginInfo,
    SamplerSpec,
    hookimpl,
)

xllm_plugin = PluginInfo(id="cpu", xllm_api=">=0.1", config="xllm_cpu.settings:CpuTable")

_CPU = frozenset({"cpu"})
_DTYPES = frozenset({"float32", "bfloat16"})
_OF_THE_CACHE = frozenset({"kv_write", "rope_kv_write", "block_copy", *QUANTIZED_KV_OPS})


@hookimpl
def xllm_devices(ctx: PluginContext) -> Iterable[DeviceSpec]:
    """The processor, where the kernels were built and it runs them. Not an accelerator: one of those is chosen first."""
    yield DeviceSpec(
        name="cpu", target="xllm_cpu.device:CpuDevice", probe="xllm_cpu.probe:probe", rank=50,
        options={"isa": ctx.settings.get("isa", "auto")}, summary="this processor, by native kernels",
    )  # fmt: skip


@hookimpl
def xllm_ops() -> Iterable[OpSpec]:
    """Every op of the core, those that only some models need, those over quantised weights and caches, and the fusions."""
    fusions = {**CORE_FUSIONS, **QUANTIZED_OPS, **QUANTIZED_KV_OPS}
    for op in (*CORE_OPS, *MODEL_OPS, *fusions):
        attribute = "".join(part.capitalize() for part in op.split("_"))
        module = (
            "xllm_cpu.quantized"
            if op in QUANTIZED_OPS
            else "xllm_cpu.cache_ops"
            if op in _OF_THE_CACHE
            else "xllm_cpu.experts"
            if op in MODEL_OPS
            else "xllm_cpu.ops"
        )
        yield OpSpec(
            name=op, op=op, target=f"{module}:{attribute}", rank=50, devices=_CPU, dtypes=_DTYPES, replaces=fusions.get(op, ())
        )  # fmt: skip


@hookimpl
def xllm_attention() -> Iterable[AttentionSpec]:
    """One kernel for prefill and decode, any head size, any block size."""
    yield AttentionSpec(
        name="paged", target="xllm_cpu.attention:PagedAttention", rank=50, devices=_CPU, dtypes=_DTYPES,
        features=frozenset({"sliding_window", "soft_cap", "int8_kv"}), summary="one softmax per split of 256 positions",
    )  # fmt: skip


@hookimpl
def xllm_samplers() -> Iterable[SamplerSpec]:
    """Token choice in one call."""
    yield SamplerSpec(
        name="gumbel", target="xllm_cpu.sampler:NativeSampler", rank=50, devices=_CPU, summary="filters and noise without a full sort or temporaries",
    )  # fmt: skip
