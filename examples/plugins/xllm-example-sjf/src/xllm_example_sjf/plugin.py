"""What this plugin offers. Imported at every start of xllm, so it imports nothing but `xllm_core.plugins`."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_core.plugins import PluginContext, PluginInfo, SchedulerSpec, hookimpl

xllm_plugin = PluginInfo(id="example-sjf", xllm_api=">=0.1", config="xllm_example_sjf.settings:SjfTable")


@hookimpl
def xllm_schedulers(ctx: PluginContext) -> Iterable[SchedulerSpec]:
    """Below the core's policies in rank: installing this changes nothing until `[use] scheduler` names it."""
    yield SchedulerSpec(
        name="sjf", target="xllm_example_sjf.policy:ShortestJobFirst", rank=-10, options=ctx.settings,
        summary="least left to compute first; waiting counts",
    )  # fmt: skip
