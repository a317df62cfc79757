"""Offers the shim, below every other device: it is used where it is named, and by the conformance kit where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import DeviceSpec, PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="cuda-shim", xllm_api=">=0.1")


@hookimpl
def xllm_devices() -> Iterable[DeviceSpec]:
    """The CPU, called cuda."""
    yield DeviceSpec(name="cuda-shim", target="xllm_cuda_shim.device:ShimDevice", rank=-100)
