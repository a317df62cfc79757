"""Importing this makes the soft device: torch_npu over the stub libraries, with numbers. In conftest and, with `-p`, in pytest of other processes."""

from __future__ import annotations

from xllm_ascend_soft.libraries import launched

# isort: split
from xllm_ascend_soft import aten, kernels

NUM_OPERATORS = aten.install()
kernels.install()

__all__ = ["NUM_OPERATORS", "launched"]
