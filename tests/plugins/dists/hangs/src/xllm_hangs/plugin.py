"""Never returns from its import."""

from __future__ import annotations

import threading

from xllm_core.plugins import PluginInfo

xllm_plugin = PluginInfo(id="hangs")
threading.Event().wait()
