"""What this environment has installed beside the core is not seen by tests of the platform: they bring dummies of their own.

In child processes `sitecustomize`, which Python imports at start, puts this in place; in the tests' own process a fixture does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import importlib_metadata

_GROUP = "xllm_core.plugins"
_all_distributions = importlib_metadata.distributions


def seen_distributions(**wanted: Any) -> Iterator[importlib_metadata.Distribution]:
    """`importlib_metadata.distributions` without the plugins that an installer put here, the core's own excepted."""
    for dist in _all_distributions(**wanted):
        is_installed = "site-packages" in Path(str(dist.locate_file(""))).parts
        if not is_installed or dist.metadata["Name"] == "xllm-core" or not dist.entry_points.select(group=_GROUP):
            yield dist
