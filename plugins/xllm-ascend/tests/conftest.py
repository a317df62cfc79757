"""Makes a soft NPU before any test: the real torch_npu on libraries of our own that keep device memory on the host."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SOFT = Path(__file__).parent / "soft"

# torch must not look for torch_npu by itself: transformers imports torch before a test can say where CANN is.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
sys.path.insert(0, str(SOFT))


def pytest_configure() -> None:
    """Nothing of this can run without the wheel, so nothing is skipped for want of it."""
    if find_spec("torch_npu") is None:
        raise pytest.UsageError(
            "these tests need torch-npu==2.13.0 (no NPU, no CANN): `make suite` runs them in .venvs/xllm-ascend, which it makes from environment.txt"
        )
    import xllm_ascend_soft.activate  # noqa: F401
