"""xLLM for Python: `LLM` for batches, `AsyncEngine` for streams, `SamplingParams` for how tokens are chosen.

Names are imported when they are first used: `import xllm_core` itself loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xllm_core.frontend.async_engine import AsyncEngine as AsyncEngine
    from xllm_core.frontend.llm import LLM as LLM
    from xllm_core.types import SamplingParams as SamplingParams

__version__ = "0.1.0"

_DOORS = {
    "LLM": "xllm_core.frontend.llm",
    "AsyncEngine": "xllm_core.frontend.async_engine",
    "SamplingParams": "xllm_core.types",
}

__all__ = ["LLM", "AsyncEngine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Import what a public name stands for, once."""
    if name not in _DOORS:
        raise AttributeError(f"module 'xllm_core' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value: object = getattr(import_module(_DOORS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, also those not imported yet."""
    return sorted({*globals(), *__all__})
