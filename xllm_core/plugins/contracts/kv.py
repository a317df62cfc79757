"""KV geometry, as a model declares it, and stores that keep blocks outside the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from xllm_core.types import KVTransfer


@dataclass(frozen=True, slots=True)
class KVTensorSpec:
    """One cache tensor of a layer: `shape` is what one slot (kind "recurrent": one block) holds, e.g. (num_kv_heads, head_size)."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class KVGroupSpec:
    """Layers that share one block table. The core assumes neither keys nor values, only tensors per slot.

    kind: "full" keeps every position; "sliding_window" keeps the last `window` tokens (window includes the query's own);
    "recurrent" keeps one state per sequence in one block, and copies of it (snapshots) at block boundaries that prefix hits and rewinds
    can return to. layers: indices into the model's layers. tensors: per layer.
    """

    name: str
    kind: str
    layers: tuple[int, ...]
    tensors: tuple[KVTensorSpec, ...]
    window: int | None = None

    def in_int8(self) -> KVGroupSpec:
        """The same with its tensors in 8 bits (`contracts.ops`): codes in their places, then a float32 step for each last axis."""
        codes = tuple(replace(tensor, dtype="int8") for tensor in self.tensors)
        steps = tuple(KVTensorSpec(f"{tensor.name}_steps", tensor.shape[:-1], "float32") for tensor in self.tensors)
        return replace(self, tensors=codes + steps)


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The whole cache of one engine.

    num_blocks: per group. block_bytes: per group, bytes of one block over all its layers and tensors.
    fingerprint: what a storage key adds to a block key (model, dtype, layout, rank), hex.
    """

    groups: tuple[KVGroupSpec, ...]
    block_size: int
    num_blocks: tuple[int, ...]
    block_bytes: tuple[int, ...]
    layout: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Hit:
    """The store holds the first `num_blocks` of the keys asked for (at least one) and keeps them until the load is over."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Later:
    """The store does not know yet. The request waits aside (WAITING_KV), is passed by others, and `lookup` is called again."""


@dataclass(frozen=True, slots=True)
class Miss:
    """The store holds nothing useful."""


class KVIndex(Protocol):
    """The scheduler's side of a store. Called while steps are planned; answers at once or says `Later`.

    With overlap the worker's thread calls the mover meanwhile: what both sides share needs a lock.
    """

    def lookup(self, keys: Sequence[bytes]) -> Hit | Later | Miss:
        """How much of a chain of storage keys (consecutive blocks of one sequence) is held."""

    def held(self, keys: Sequence[bytes]) -> Sequence[bool] | Later:
        """Which of these blocks, each for itself, are held or on their way; asked before a lookup where not every block of a chain is needed
        (sliding windows, recurrent states). Later if the store has to find out."""

    def wants(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """Which of these blocks the store would like to be given now (False: held already, or on the way)."""

    def planned(self, transfer: KVTransfer) -> None:
        """A transfer with this ticket goes into the next plan."""

    def finished(self, ticket: int, has_succeeded: bool) -> None:
        """The worker reported the end of a transfer."""


class KVMover(Protocol):
    """The worker's side of a store. Neither call blocks on I/O."""

    def start(self, transfers: Sequence[KVTransfer]) -> None:
        """Begin, in order. Blocks of a transfer are leased: nobody else writes to them until it is finished."""

    def poll(self) -> Sequence[tuple[int, bool]]:
        """(ticket, has_succeeded) of transfers that ended since the last call. A load that failed has written nothing that counts."""

    def close(self) -> None:
        """End threads and free memory."""


class KVView(Protocol):
    """The device cache as a mover sees it: bytes of blocks, whatever the groups hold."""

    def read_block(self, group: int, block_id: int) -> torch.Tensor:
        """A host copy of one block over all layers and tensors of the group: uint8, [block_bytes of the group]."""

    def write_block(self, group: int, block_id: int, data: torch.Tensor) -> None:
        """Restore what `read_block` returned."""


class KVStore(Protocol):
    """Both sides; in this process they may share memory. With several processes each side is built where it runs."""

    def index(self) -> KVIndex:
        """The scheduler's side."""

    def mover(self, view: KVView) -> KVMover:
        """The worker's side."""

    def stats(self) -> dict[str, int]:
        """Counters: "stored_blocks", "loaded_blocks", "evicted_blocks", "hits", "misses", "laters", "used_bytes"."""
