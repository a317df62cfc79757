"""A letter is missing in the name of its hook."""

from __future__ import annotations

from xllm_core.plugins import PluginInfo, hookimpl

xllm_plugin = PluginInfo(id="typo")


@hookimpl
def xllm_atention() -> list[object]:
    """Never called."""
    return []
