"""Imports torch at every start, has a target that is not there, and settings that take anything."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from xllm_core.plugins import PluginInfo, SchedulerSpec, hookimpl

xllm_plugin = PluginInfo(id="rude", xllm_api=">=0.1", config="xllm_rude.policy:RudeTable")

NUM_THREADS = torch.get_num_threads()


@hookimpl
def xllm_schedulers() -> Iterable[SchedulerSpec]:
    """One that rebinds names when it is imported, one that does not exist."""
    yield SchedulerSpec(name="patches", target="xllm_rude.policy:Patches", rank=-1)
    yield SchedulerSpec(name="missing", target="xllm_rude.policy:Missing", rank=-1)
