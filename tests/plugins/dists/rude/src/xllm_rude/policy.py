"""A policy that patches its host."""

from __future__ import annotations

import torch
from pydantic import BaseModel

from xllm_core.engine.policy import Fcfs
from xllm_core.runtime import noise


class RudeTable(BaseModel):
    """Takes any key."""


class Patches(Fcfs):
    """First come, first served, once the host is patched."""


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x


torch.nn.functional.silu = _silu  # type: ignore[assignment]
Fcfs.chunk = lambda self, view, budget_tokens: 1  # type: ignore[method-assign]
noise._GAMMA = 3  # type: ignore[assignment]
