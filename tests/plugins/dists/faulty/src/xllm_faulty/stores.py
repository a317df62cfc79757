"""Stores with a fault."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xllm_core.kv.host_store import HostIndex, HostMover, HostStore
from xllm_core.plugins import Hit, KVGeometry, KVView, Later, Miss
from xllm_core.types import KVTransfer


class _Store(HostStore):
    def __init__(self, config: Mapping[str, Any], geometry: KVGeometry) -> None:
        super().__init__({"host_store_bytes": 1 << 20}, geometry)


class FlipsABit(_Store):
    """One bit of each block changes on its way to the device."""

    def mover(self, view: KVView) -> HostMover:
        return super().mover(_Flipping(view))


class _Flipping:
    def __init__(self, view: KVView) -> None:
        self._view = view

    def read_block(self, group: int, block_id: int) -> torch.Tensor:
        return self._view.read_block(group, block_id)

    def write_block(self, group: int, block_id: int, data: torch.Tensor) -> None:
        data = data.clone()
        data[-1] ^= 1
        self._view.write_block(group, block_id, data)


class _Waiting(HostIndex):
    def lookup(self, keys: Sequence[bytes]) -> Hit | Later | Miss:
        threading.Event().wait(60)
        return super().lookup(keys)


class LookupWaits(_Store):
    """Asks somebody and waits for the answer."""

    def index(self) -> HostIndex:
        return _Waiting(self._shelf, self._geometry)


class _Synchronous(HostMover):
    def start(self, transfers: Sequence[KVTransfer]) -> None:
        for transfer in transfers:
            has_succeeded = self._move(transfer)
            with self._shelf.lock:
                self._ended.append((transfer.ticket, has_succeeded))


class StartWaits(_Store):
    """Copies where it is called."""

    def mover(self, view: KVView) -> HostMover:
        return _Synchronous(self._shelf, self._geometry, view)


class _Boasting(HostIndex):
    def lookup(self, keys: Sequence[bytes]) -> Hit | Later | Miss:
        found = super().lookup(keys)
        return Hit(len(keys)) if isinstance(found, Hit) else found


class AlwaysHits(_Store):
    """A chain whose first block is held is said to be held whole."""

    def index(self) -> HostIndex:
        return _Boasting(self._shelf, self._geometry)
