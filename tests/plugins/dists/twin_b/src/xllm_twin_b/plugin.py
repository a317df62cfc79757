"""One of two distributions that claim the id `twin`."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import PluginInfo, SchedulerSpec, hookimpl

xllm_plugin = PluginInfo(id="twin")


@hookimpl
def xllm_schedulers() -> Iterable[SchedulerSpec]:
    """A name that tells which of the two was loaded."""
    yield SchedulerSpec(name="from_b", target="xllm_core.engine.policy:Fcfs", rank=-1)
