"""Takes its process down while it is imported, as a crashing library would."""

from __future__ import annotations

import os

from xllm_core.plugins import PluginInfo

xllm_plugin = PluginInfo(id="exits")
os._exit(7)
