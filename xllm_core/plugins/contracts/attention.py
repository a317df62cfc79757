"""Paged attention. One kernel instance per worker and KV geometry, built before anything runs.

T tokens in this step, R rows, H query heads, G KV heads (H % G == 0), D head size, B blocks, S slots per block.
Source of the paged layout: PagedAttention, arXiv:2309.06180.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """What a kernel is asked to serve; matched against the spec's data before anything is imported.

    scale: factor on q·k. sliding_window: tokens seen including the query's own, None for all. soft_cap: tanh cap on scores, None for none.
    kv_dtype: what keys and values are quantised to ("int8"), None for the model's dtype.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    block_size: int
    dtype: str
    layout: str = "BSGD"
    sliding_window: int | None = None
    soft_cap: float | None = None
    kv_dtype: str | None = None

    @property
    def features(self) -> frozenset[str]:
        """Features a kernel must declare to be allowed here."""
        named = {"sliding_window": self.sliding_window is not None, "soft_cap": self.soft_cap is not None}
        named[f"{self.kv_dtype}_kv"] = self.kv_dtype is not None
        return frozenset(name for name, is_needed in named.items() if is_needed)


@dataclass(slots=True)
class BatchLayout:
    """The ragged batch of one step as one KV group sees it. Host side, numpy-backed, owned by the runner and read only.

    The same object, its arrays moved on in place, may be that of the next step: a plan copies what it needs.

    query_lens: [R] int32, new tokens per row. kv_lens: [R] int32, tokens per row after this step, new ones included.
    query_starts: [R + 1] int32, prefix sums of query_lens. block_tables: [R, max_blocks] int32; -1 is a hole outside the window.
    """

    query_lens: torch.Tensor
    kv_lens: torch.Tensor
    query_starts: torch.Tensor
    block_tables: torch.Tensor


@dataclass(slots=True)
class KVSegments:
    """Where a layer's keys and values lie. `own`: the group's cache tensors, (k, v) each [B, S, G, D] in layout "BSGD"; in 8 bits
    (k, v, steps of k, steps of v), these [B, S, G] float32 (`contracts.ops`, "Keys and values in 8 bits").

    shared: tensors of a prefix that all rows see first; only for kernels that declare "segments".
    """

    own: tuple[torch.Tensor, ...]
    shared: tuple[torch.Tensor, ...] | None = None


class AttentionKernel(Protocol):
    """Causal attention over paged KV that is already stored. Row i attends to positions 0 .. kv_lens[i] - 1 of its own."""

    def plan(self, batch: BatchLayout) -> Any:
        """Lay out one step on the host: splits, tile order, gathers. Called once per step and KV group, before the layers run.

        Splits over KV have a fixed size, so that a row's result does not depend on its neighbours.
        """

    def run(self, q: torch.Tensor, kv: KVSegments, plan: Any, out: torch.Tensor) -> None:
        """Attend. Called once per layer; reads KV only, the op `kv_write` has stored it.

        q, out: [T, H, D], model dtype, already rotated; `out` is the caller's and is overwritten, never resized.
        Raises nothing: what can be refused was refused by capability matching at assembly.
        """
