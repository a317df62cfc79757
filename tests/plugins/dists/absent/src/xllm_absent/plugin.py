"""Offers a device whose probe says no, and an op for it."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import DeviceSpec, OpSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="absent", xllm_api=">=0.1")


@hookimpl
def xllm_devices() -> Iterable[DeviceSpec]:
    """Never there."""
    yield DeviceSpec(
        name="absent", target="xllm_absent.device:Absent", probe="xllm_absent.device:probe", is_accelerator=True
    )


@hookimpl
def xllm_ops() -> Iterable[OpSpec]:
    """Of use nowhere."""
    yield OpSpec(
        name="embedding", op="embedding", target="xllm_absent.device:Embedding", devices={"absent"}, dtypes={"float32"}
    )
