"""What xllm-ascend offers. Names only: neither torch nor torch_npu is imported before the device is chosen."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import AttentionSpec, CommandSpec, DeviceSpec, OpSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="ascend", xllm_api=">=0.1")

_NPU = frozenset({"npu"})
_DTYPES = frozenset({"bfloat16"})
_TORCH_NPU = ("torch_npu",)


@hookimpl
def xllm_devices() -> Iterable[DeviceSpec]:
    """One NPU."""
    yield DeviceSpec(
        name="npu",
        target="xllm_ascend.device:NpuDevice",
        rank=50,
        probe="xllm_ascend.probe:probe",
        is_accelerator=True,
        summary="an Ascend NPU of the Atlas A2 or A3 series",
    )


@hookimpl
def xllm_ops() -> Iterable[OpSpec]:
    """torch_npu's fused operators, and torch's own where there is nothing to fuse."""
    fused = {
        "rms_norm": "RmsNorm",
        "add_rms_norm": "AddRmsNorm",
        "rope": "Rope",
        "silu_mul": "SiluMul",
        "kv_write": "KvWrite",
    }
    plain = {"linear": "Linear", "embedding": "Embedding", "block_copy": "BlockCopy"}
    for module, summary, classes in (("fused", "torch_npu's", fused), ("plain", "torch's own on the NPU", plain)):
        for op, name in classes.items():
            yield OpSpec(
                name=op, op=op, target=f"xllm_ascend.{module}:{name}", rank=50, requires=_TORCH_NPU, devices=_NPU, dtypes=_DTYPES,
                layouts=frozenset({"BSGD"}) if op == "kv_write" else frozenset(), summary=summary,
            )  # fmt: skip


@hookimpl
def xllm_attention() -> Iterable[AttentionSpec]:
    """Fused-infer attention."""
    yield AttentionSpec(
        name="fused-infer", target="xllm_ascend.attention:FusedInferAttention", rank=50, requires=_TORCH_NPU,
        check="xllm_ascend.limits:check_attention", devices=_NPU, dtypes=_DTYPES, block_sizes=frozenset({128}),
        summary="npu_fused_infer_attention_score: ragged rows over a paged cache",
    )  # fmt: skip


@hookimpl
def xllm_cli() -> Iterable[CommandSpec]:
    """`xllm ascend bringup`."""
    yield CommandSpec(
        name="bringup",
        target="xllm_ascend.bringup:command",
        summary="Prove this plugin on a real NPU: conformance, verify, throughput.",
    )
