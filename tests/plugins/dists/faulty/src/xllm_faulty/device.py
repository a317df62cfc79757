"""A device that promises more than it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from xllm_core.plugins import DeviceFacts
from xllm_core.reference.device import ReferenceDevice


class Boaster(ReferenceDevice):
    """Says that rows are equal to the bit, and hands out memory with something in it."""

    def facts(self) -> DeviceFacts:
        return replace(super().facts(), kind="boaster", name="boaster", dtypes=("float32",), is_row_invariant=True)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return super().allocate(shape, dtype).fill_(1)
