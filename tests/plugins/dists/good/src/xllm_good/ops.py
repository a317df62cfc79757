"""An op, and what stands for several."""

from __future__ import annotations

from typing import Any

import torch

from xllm_core.reference.quantization import Int8


class Inner(Int8):
    """8-bit weights, as the core's."""


class ToyLinear:
    """x @ weight.T + bias, counted."""

    num_calls = 0

    def __init__(self, device: Any) -> None:
        self.device = device

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Kept as they are."""
        return weight, bias

    def __call__(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        ToyLinear.num_calls += 1
        weight, bias = prepared
        y = x @ weight.T
        return y if bias is None else y + bias


class ToyLmHead(ToyLinear):
    """The same, in float32."""

    def __call__(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        return super().__call__(x, prepared).float()


class ToyLinearSiluMul:
    """silu(gate) * up in one, counted."""

    num_calls = 0

    def __init__(self, device: Any) -> None:
        self.device = device

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """Kept as they are."""
        return weight, bias

    def __call__(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """[T, in] -> [T, out / 2]."""
        ToyLinearSiluMul.num_calls += 1
        gate, up = torch.nn.functional.linear(x, *prepared).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


class ToyRopeKvWrite:
    """Rotates and stores, counted."""

    num_calls = 0

    def __init__(self, device: Any) -> None:
        self.device = device

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, caches: Any, slots: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """Returns q rotated; no slot of the toy's tests is -1."""
        ToyRopeKvWrite.num_calls += 1
        for new, cache in zip((_rotated(k, cos, sin), v), caches, strict=True):
            cache.view(-1, *cache.shape[2:])[slots] = new
        return _rotated(q, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
