"""Host memory that calls itself a toy. Everything but the facts is the reference's, so that a real model runs on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from xllm_core.plugins import DeviceFacts
from xllm_core.reference.device import ReferenceDevice


class ToyDevice:
    """A `DeviceBackend`."""

    def __init__(self, index: int) -> None:
        if index > 1:
            raise ValueError(f"there is no toy {index}")
        self._inner = ReferenceDevice(0)

    def facts(self) -> DeviceFacts:
        """Blocks of 4, which no kernel reads, or 8."""
        return replace(self._inner.facts(), kind="toy", name="toy", dtypes=("float32",), block_sizes=(4, 8))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
