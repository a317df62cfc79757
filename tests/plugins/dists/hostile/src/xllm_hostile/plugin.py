"""Offers the hostile device, and for it everything that a model asks for."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import CORE_FUSIONS, CORE_OPS, AttentionSpec, DeviceSpec, OpSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="hostile", xllm_api=">=0.1")

_DEVICES = frozenset({"hostile"})
_DTYPES = frozenset({"float32"})
_HOME = "xllm_core.testing.hostile"


@hookimpl
def xllm_devices() -> Iterable[DeviceSpec]:
    """CPU memory and nothing else as usual. Below the reference: it is used where it is named."""
    yield DeviceSpec(name="hostile", target=f"{_HOME}:HostileDevice", rank=-10)


@hookimpl
def xllm_ops() -> Iterable[OpSpec]:
    """The reference's ops and fusions, but for those that have to know the layout of the cache."""
    for op in CORE_OPS:
        attribute = "".join(part.capitalize() for part in op.split("_"))
        target = f"{_HOME}:HostileKvWrite" if op == "kv_write" else f"xllm_core.reference.ops:{attribute}"
        layouts = frozenset({"BGSD"}) if op == "kv_write" else frozenset()
        yield OpSpec(name=op, op=op, target=target, devices=_DEVICES, dtypes=_DTYPES, layouts=layouts)
    for fusion, target in (
        ("linear_silu_mul", "xllm_core.reference.ops:LinearSiluMul"),
        ("rope_kv_write", f"{_HOME}:HostileRopeKvWrite"),
    ):
        yield OpSpec(
            name=fusion, op=fusion, target=target, devices=_DEVICES, dtypes=_DTYPES, replaces=CORE_FUSIONS[fusion]
        )


@hookimpl
def xllm_attention() -> Iterable[AttentionSpec]:
    """Paged attention over the other layout, in blocks of 24."""
    yield AttentionSpec(
        name="paged", target=f"{_HOME}:HostileAttention", devices=_DEVICES, dtypes=_DTYPES, block_sizes=frozenset({24}),
        layouts=("BGSD",), features=frozenset({"sliding_window", "soft_cap"}),
    )  # fmt: skip
