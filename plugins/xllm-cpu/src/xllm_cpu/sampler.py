"""Token choice by one native call; the definition is the core's `GumbelSampler`. See `native/sample.cpp`."""

from __future__ import annotations

import ctypes

import torch

from xllm_core.plugins import SamplingBatch
from xllm_cpu.device import CpuDevice
from xllm_cpu.native import SamplingColumns

_DTYPES = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
_GREEDY = SamplingColumns()
_NOISE = ("seeds", "indices", "positions")


class NativeSampler:
    """A `Sampler`. A row's token depends on that row alone; equal scores go to the lowest id."""

    def __init__(self, device: CpuDevice) -> None:
        self._native = device.native
        self._room: dict[int, tuple[torch.Tensor, int]] = {}

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """logits: [S, V] float32, overwritten. Returns [S] int64, as it is until the next call. Raises ValueError for columns that do not fit."""
        num_rows, vocab_size = logits.shape if logits.dim() == 2 else (0, 0)
        if logits.dtype != torch.float32 or vocab_size == 0 or not logits.is_cpu:
            raise ValueError(
                f"logits must be [S, V] float32 on the CPU, they are {tuple(logits.shape)} {logits.dtype}, {logits.device}"
            )
        if not logits.is_contiguous():
            logits = logits.contiguous()
        kept: dict[str, torch.Tensor] = {}
        if not batch.is_all_greedy and batch.temperature is not None:
            kept = {
                name: _column(batch, name, dtype, num_rows)
                for name, dtype in _DTYPES.items()
                if getattr(batch, name) is not None
            }
            kept |= {name: _column(batch, name, torch.int64, num_rows) for name in _NOISE}
        columns = SamplingColumns(**{name: column.data_ptr() for name, column in kept.items()}) if kept else _GREEDY
        found = self._room.get(num_rows)
        if found is None:  # kept: behind a step a call into torch takes longer than one row's choice
            tokens = torch.empty(num_rows, dtype=torch.int64)
            found = self._room[num_rows] = tokens, tokens.data_ptr()
        if bad := self._native.sample(logits.data_ptr(), num_rows, vocab_size, ctypes.addressof(columns), found[1]):
            raise ValueError(f"temperature {float(kept['temperature'][bad - 1])} of row {bad - 1} must be 0 or more")
        return found[0]


def _column(batch: SamplingBatch, name: str, dtype: torch.dtype, num_rows: int) -> torch.Tensor:
    column: torch.Tensor = getattr(batch, name)
    if column.shape != (num_rows,):
        raise ValueError(f"{name} is {tuple(column.shape)} for {num_rows} rows")
    return column.to(dtype).contiguous()
