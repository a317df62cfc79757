"""For processes that tests start and that start others: with this folder on PYTHONPATH, the soft device has its numbers as soon as one is built."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


class BeforeTheDevice(MetaPathFinder):
    """Finds nothing. Imports the numbers when the plugin's device is about to be imported, so that other processes stay light."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """As importlib calls it."""
        if name == "xllm_ascend.device":
            sys.meta_path.remove(self)
            import xllm_ascend_soft.activate  # noqa: F401


sys.meta_path.insert(0, BeforeTheDevice())
