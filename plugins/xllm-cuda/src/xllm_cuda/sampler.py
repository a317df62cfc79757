"""The sampler: three or four launches for rows of every kind, the reference's tokens under the reference's noise."""

from __future__ import annotations

import torch

from xllm_core.plugins import DeviceBackend, SamplingBatch, stream_keys
from xllm_cuda.kernels.sampling import choose_tokens
from xllm_cuda.kernels.sampling_chunks import BINS, best_of_chunks, part_chunks, score_chunks
from xllm_cuda.tiling import next_power_of_2, sampler_tiling


class TritonSampler:
    """Temperature, top-k, top-p, min-p, noise, argmax. A row has many programs; nothing is sorted and nothing waits for the host."""

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
        num_rows, vocab = logits.shape
        tiling = sampler_tiling(vocab)
        num_chunks = -(-vocab // tiling.chunk)
        is_parted = batch.top_k is not None or batch.top_p is not None

        def scratch(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return logits.new_empty((num_rows, *sizes), dtype=dtype)

        def scratch_of_parts(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return scratch(*sizes, dtype=dtype) if is_parted else logits.new_empty(1, dtype=dtype)

        maxima, tokens = scratch(num_chunks), scratch(num_chunks, dtype=torch.int32)
        noised, noised_tokens = scratch(num_chunks), scratch(num_chunks, dtype=torch.int32)
        weights, sure_weights = scratch_of_parts(num_chunks), scratch_of_parts(num_chunks)
        counts, facts = (scratch_of_parts(*sizes, dtype=torch.int32) for sizes in ((num_chunks, BINS.value), (2,)))
        open_logits, open_tokens = (
            scratch_of_parts(tiling.room, dtype=dtype) for dtype in (torch.float32, torch.int32)
        )

        unused = batch.temperature
        columns = (
            batch.temperature,
            *(unused if c is None else c for c in (batch.top_k, batch.top_p, batch.min_p)),
            keys,
        )
        sizes = (logits.stride(0), vocab, num_chunks)
        has = (batch.top_k is not None, batch.top_p is not None, batch.min_p is not None)
        of_chunks, of_row = tiling.chunk, next_power_of_2(num_chunks)
        grid = (num_rows, num_chunks)
        best_of_chunks[grid](logits, maxima, tokens, *sizes, of_chunks, tiling.wide_block, num_warps=tiling.num_warps)
        score_chunks[grid](
            logits, maxima, tokens, noised, noised_tokens, weights, counts, *columns, *sizes, *has,
            of_chunks, of_row, tiling.block, tiling.wide_block, num_warps=tiling.num_warps,
        )  # fmt: skip
        if is_parted:
            part_chunks[grid](
                logits, maxima, tokens, noised, noised_tokens, weights, sure_weights, counts, facts, open_logits, open_tokens,
                *columns, *sizes, *has, of_chunks, of_row, tiling.room, tiling.block, num_warps=tiling.num_warps,
            )  # fmt: skip
        choose_tokens[(num_rows,)](
            logits, maxima, tokens, noised, noised_tokens, weights, sure_weights, facts, open_logits, open_tokens,
            *columns, chosen, *sizes, *has, of_row, tiling.room, tiling.block, num_warps=tiling.row_warps,
        )  # fmt: skip
        return chosen
