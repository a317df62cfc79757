"""The sampler: one launch for rows of every kind, the reference's tokens under the reference's noise."""

from __future__ import annotations

import torch

from xllm_core.plugins import DeviceBackend, SamplingBatch, stream_keys
from xllm_cuda.kernels.sampling import sample_rows
from xllm_cuda.tiling import sampler_tiling


class TritonSampler:
    """Temperature, top-k, top-p, min-p, noise, argmax, in one program per row; nothing is sorted and nothing waits for the host."""

    def __init__(self, device: DeviceBackend) -> None:
        self._device = device

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """logits: [S, V] float32, left as they are. Returns [S] int64."""
        if batch.is_all_greedy or batch.temperature is None:
            return logits.argmax(dim=-1)
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        keys = self._device.to_device(
            stream_keys(batch.seeds.tolist(), batch.indices.tolist(), batch.positions.tolist())
        )
        chosen = torch.empty_like(keys)
        unused = batch.temperature
        tiling = sampler_tiling(logits.shape[-1])
        sample_rows[(len(logits),)](
            logits, batch.temperature, *(unused if c is None else c for c in (batch.top_k, batch.top_p, batch.min_p)), keys, chosen,
            logits.stride(0), logits.shape[-1], batch.top_k is not None, batch.top_p is not None, batch.min_p is not None,
            tiling.block, num_warps=tiling.num_warps,
        )  # fmt: skip
        return chosen
