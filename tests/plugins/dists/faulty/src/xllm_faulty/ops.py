"""Ops with a fault."""

from __future__ import annotations

from typing import Any

import torch

from xllm_core.reference import ops


class Rounds(ops.Linear):
    """Sums in half the precision that is promised."""

    def __call__(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        weight, bias = prepared
        return (
            super().__call__(x.bfloat16(), (weight.bfloat16(), None if bias is None else bias.bfloat16())).to(x.dtype)
        )


class FeelsRows(ops.Linear):
    """Another order of summation for many rows than for few: right, and not what the device promises."""

    def __call__(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        weight, bias = prepared
        if len(x) <= 8:
            return super().__call__(x, prepared)
        half = x.shape[1] // 2
        total = x[:, half:] @ weight[:, half:].T + x[:, :half] @ weight[:, :half].T
        return total if bias is None else total + bias


class WritesMinusOne(ops.KvWrite):
    """Takes slot -1 for the last one."""

    def __call__(self, new: Any, caches: Any, slots: torch.Tensor) -> None:
        super().__call__(new, caches, slots % (caches[0].shape[0] * caches[0].shape[1]))


class ChangesInput(ops.SiluMul):
    """Works in place on what it may only read."""

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        result = super().__call__(gate_up)
        gate_up.zero_()
        return result
