"""What this environment has installed beside the core is not seen by tests of the platform: they bring dummies of their own.

In child processes `sitecustomize`, which Python imports at start, puts this in place; in the tests' own process a fixture does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import importlib_metadata

_GROUP = "xllm_core.plugins"
_all_entry_points = importlib_metadata.entry_points


def hide_installed(**wanted: Any) -> importlib_metadata.EntryPoints:
    """`importlib_metadata.entry_points` without the plugins that an installer put here, the core's own excepted."""

    def is_seen(entry: importlib_metadata.EntryPoint) -> bool:
        dist = entry.dist
        if entry.group != _GROUP or dist is None or dist.metadata["Name"] == "xllm-core":
            return True
        return "site-packages" not in Path(str(dist.locate_file(""))).parts

    return importlib_metadata.EntryPoints(entry for entry in _all_entry_points(**wanted) if is_seen(entry))
