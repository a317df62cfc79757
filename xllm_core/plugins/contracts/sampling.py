"""Token choice and what changes logits before it. Vectorised over the batch; state lives in fixed slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from xllm_core.types import SlotState


@dataclass(frozen=True, slots=True)
class ProcessorContext:
    """What a logits processor is built with. Slots run from 0 to num_slots - 1."""

    num_slots: int
    vocab_size: int
    torch_device: str


class LogitsProcessor(Protocol):
    """Changes logits in place. Slots are entered, forked and left as the plan says; a slot may be entered again with other contents."""

    def admit(self, state: SlotState) -> bool:
        """A sequence enters `state.slot`. True if this processor must be called for it; state for it is set up here."""

    def release(self, slot: int) -> None:
        """The sequence in `slot` left; called only for slots that `admit` or `fork` accepted."""

    def fork(self, source: int, destination: int) -> None:
        """`destination` becomes a copy of `source`."""

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> None:
        """logits: [len(slots), V] float32, changed in place; only rows whose slots this processor accepted."""

    def observe(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Tokens chosen for these slots (all accepted by this processor), in order."""


@dataclass(slots=True)
class SamplingBatch:
    """Columns for the S samples of one step.

    On the sampler's device, None where no row of the batch uses the feature: temperature [S] float32 (0 greedy), top_k [S] int64 (0 off),
    top_p [S] float32, min_p [S] float32. On the host: seeds [S] int64, indices [S] int64, positions [S] int64, the arguments of the noise,
    from which `stream_keys` makes keys there; [0] where all rows are greedy, which have no noise.
    """

    is_all_greedy: bool
    temperature: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    seeds: torch.Tensor
    indices: torch.Tensor
    positions: torch.Tensor


class Sampler(Protocol):
    """Chooses one token per row: argmax, or argmax of noised scores with noise as a pure function of (seed, index, position)."""

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """logits: [S, V] float32, may be overwritten. Returns [S] int64, good until the next call. Row i depends on row i alone."""
