"""A bounded KV store in host memory: blocks that the device lets go of rest here, bit for bit, until they are asked for again.

Three parties share one shelf of entries under one lock: the index (scheduler side, between steps), the mover (worker side) and
the mover's thread, which does all copying. Room is made when a save is planned, never later, so an entry that a lookup saw stays
until the scheduler plans something else; planning a load pins its entries until the load has ended.

Heads of a prefix count as more recently used than its tails: what is evicted first is what the others do not need.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xllm_core.errors import ConfigError
from xllm_core.plugins.contracts.kv import Hit, KVGeometry, KVView, Later, Miss

if TYPE_CHECKING:
    import torch

    from xllm_core.types import KVTransfer

_logger = logging.getLogger(__name__)
_MAX_CLOSE_S = 5.0


@dataclass(slots=True)
class _Entry:
    """What one storage key names. data: by group, None while the save is on the way. num_pins: transfers that need it now."""

    num_bytes: int
    data: dict[int, torch.Tensor] | None = None
    num_pins: int = 0


@dataclass(slots=True)
class _Shelf:
    """Everything shared; read and written only under `lock`. entries: least recently used first."""

    max_bytes: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    entries: OrderedDict[bytes, _Entry] = field(default_factory=OrderedDict)
    pinned: dict[int, list[bytes]] = field(default_factory=dict)  # by ticket, until finished: what it fills, or reads
    used_bytes: int = 0
    is_closed: bool = False
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("stored_blocks", "loaded_blocks", "evicted_blocks", "hits", "misses", "laters"), 0
        )
    )

    def make_room(self, num_bytes: int) -> bool:
        """Evict idle entries, least recently used first, until `num_bytes` fit; False, and nothing evicted, if they cannot."""
        victims: list[bytes] = []
        room = self.max_bytes - self.used_bytes
        for key, entry in self.entries.items():
            if room >= num_bytes:
                break
            if entry.num_pins == 0:
                victims.append(key)
                room += entry.num_bytes
        if room < num_bytes:
            return False
        for key in victims:
            self.remove(key)
        self.counts["evicted_blocks"] += len(victims)
        return True

    def remove(self, key: bytes) -> None:
        """Forget an entry and give its bytes back."""
        self.used_bytes -= self.entries.pop(key).num_bytes


class HostIndex:
    """The scheduler's side. Answers from memory, at once."""

    def __init__(self, shelf: _Shelf, geometry: KVGeometry) -> None:
        self._shelf = shelf
        self._block_bytes = geometry.block_bytes

    def lookup(self, keys: Sequence[bytes]) -> Hit | Later | Miss:
        """Hit for the leading keys that are here; Later if the chain meets one whose save is on the way."""
        shelf = self._shelf
        with shelf.lock:
            num_found = 0
            for key in keys:
                entry = shelf.entries.get(key)
                if entry is None:
                    break
                if entry.data is None:
                    shelf.counts["laters"] += 1
                    return Later()
                num_found += 1
            shelf.counts["hits" if num_found else "misses"] += 1
            for key in reversed(keys[:num_found]):
                shelf.entries.move_to_end(key)
            return Hit(num_found) if num_found else Miss()

    def held(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """True for blocks that are here or on the way."""
        with self._shelf.lock:
            return [key in self._shelf.entries for key in keys]

    def wants(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """True for blocks that are neither here nor on the way; at most as many as could ever be here together."""
        shelf = self._shelf
        with shelf.lock:
            room = 0 if shelf.is_closed else shelf.max_bytes // min(self._block_bytes)
            answers = []
            for key in keys:
                is_wanted = key not in shelf.entries and room > 0
                room -= is_wanted
                answers.append(is_wanted)
            return answers

    def planned(self, transfer: KVTransfer) -> None:
        """Make room for a save, or pin what a load reads. Of a save too large, the first entries are kept."""
        shelf = self._shelf
        with shelf.lock:
            take = self._pin_for_load if transfer.is_load else self._reserve_for_save
            shelf.pinned[transfer.ticket] = [] if shelf.is_closed else take(transfer)

    def finished(self, ticket: int, has_succeeded: bool) -> None:
        """Unpin; entries that a failed save left empty go."""
        shelf = self._shelf
        with shelf.lock:
            for key in shelf.pinned.pop(ticket, []):
                entry = shelf.entries.get(key)
                if entry is None:
                    continue  # closed meanwhile
                entry.num_pins -= 1
                if entry.data is None:
                    shelf.remove(key)

    def _reserve_for_save(self, transfer: KVTransfer) -> list[bytes]:
        shelf, pinned = self._shelf, []
        for i, key in enumerate(transfer.keys):
            if key in shelf.entries:
                continue
            num_bytes = sum(
                self._block_bytes[group] for group, blocks in enumerate(transfer.block_ids) if blocks[i] >= 0
            )
            if not shelf.make_room(num_bytes):
                break
            shelf.entries[key] = _Entry(num_bytes, num_pins=1)
            shelf.used_bytes += num_bytes
            pinned.append(key)
        for key in reversed(pinned):
            shelf.entries.move_to_end(key)
        return pinned

    def _pin_for_load(self, transfer: KVTransfer) -> list[bytes]:
        entries = [self._shelf.entries.get(key) for key in transfer.keys]
        ready = [entry for entry in entries if entry is not None and entry.data is not None]
        if len(ready) < len(entries):
            return []  # gone since the lookup: the mover finds nothing pinned, and the load fails
        for entry in ready:
            entry.num_pins += 1
        return list(transfer.keys)


class HostMover:
    """The worker's side: a queue, one thread that copies, and a list of what has ended."""

    def __init__(self, shelf: _Shelf, geometry: KVGeometry, view: KVView) -> None:
        self._shelf = shelf
        self._block_bytes = geometry.block_bytes
        self._view = view
        self._ended: list[tuple[int, bool]] = []
        self._queue: queue.SimpleQueue[KVTransfer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="xllm-host-store", daemon=True)
        self._thread.start()

    def start(self, transfers: Sequence[KVTransfer]) -> None:
        """Queue them, in order; after `close` they fail at once."""
        with self._shelf.lock:
            if self._shelf.is_closed:
                self._ended += [(transfer.ticket, False) for transfer in transfers]
                return
            for transfer in transfers:
                self._queue.put(transfer)

    def poll(self) -> Sequence[tuple[int, bool]]:
        """Tickets that ended since the last call."""
        with self._shelf.lock:
            ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Let the copy under way end, fail the rest, free the memory. May be called again."""
        with self._shelf.lock:
            if not self._shelf.is_closed:
                self._shelf.is_closed = True
                self._queue.put(None)
        self._thread.join(_MAX_CLOSE_S)
        if self._thread.is_alive():
            _logger.warning(
                "the host store's thread still copies %g s after close; its blocks stay leased", _MAX_CLOSE_S
            )
        with self._shelf.lock:
            self._shelf.entries.clear()
            self._shelf.used_bytes = 0

    def _run(self) -> None:
        while (transfer := self._queue.get()) is not None:
            with self._shelf.lock:
                is_closed = self._shelf.is_closed
            has_succeeded = not is_closed and self._move(transfer)
            with self._shelf.lock:
                self._ended.append((transfer.ticket, has_succeeded))

    def _move(self, transfer: KVTransfer) -> bool:
        try:
            return self._load(transfer) if transfer.is_load else self._save(transfer)
        except Exception:
            # Whatever the device's copy raises: the ticket must end, or its blocks stay leased for ever.
            kind = "load" if transfer.is_load else "save"
            _logger.exception(
                "%s %d of %d blocks failed; they will be computed again", kind, transfer.ticket, len(transfer.keys)
            )
            return False

    def _save(self, transfer: KVTransfer) -> bool:
        shelf = self._shelf
        with shelf.lock:
            mine = set(shelf.pinned.get(transfer.ticket, ()))
        for i, key in enumerate(transfer.keys):
            if key not in mine:
                continue
            data = {
                group: self._read(group, blocks[i]) for group, blocks in enumerate(transfer.block_ids) if blocks[i] >= 0
            }
            with shelf.lock:
                entry = shelf.entries.get(key)
                if entry is None:
                    return False  # closed meanwhile
                entry.data = data
                shelf.counts["stored_blocks"] += 1
        return True

    def _load(self, transfer: KVTransfer) -> bool:
        shelf = self._shelf
        with shelf.lock:
            if shelf.is_closed or len(shelf.pinned.get(transfer.ticket, ())) < len(transfer.keys):
                return False
            found = [shelf.entries[key].data for key in transfer.keys]
        for i, data in enumerate(found):
            for group, blocks in enumerate(transfer.block_ids):
                if blocks[i] < 0:
                    continue
                if data is None or group not in data:
                    return False
                self._view.write_block(group, blocks[i], data[group])
        with shelf.lock:
            shelf.counts["loaded_blocks"] += len(found)
        return True

    def _read(self, group: int, block: int) -> torch.Tensor:
        data = self._view.read_block(group, block)
        num_bytes = data.numel() * data.element_size()
        if num_bytes != self._block_bytes[group]:
            raise ValueError(
                f"block {block} of group {group} has {num_bytes} bytes, the geometry says {self._block_bytes[group]}"
            )
        return data


class HostStore:
    """Implements `contracts.kv.KVStore` in this process. config: "host_store_bytes", the bound on block contents."""

    def __init__(self, config: Mapping[str, Any], geometry: KVGeometry) -> None:
        max_bytes = int(config["host_store_bytes"])
        if max_bytes < sum(geometry.block_bytes):
            raise ConfigError(
                f"[plugin.core] host_store_bytes = {max_bytes} cannot hold one block of {geometry.block_size} tokens, "
                f"which takes {sum(geometry.block_bytes)} bytes; raise it, or choose no KV store"
            )
        self._geometry = geometry
        self._shelf = _Shelf(max_bytes)
        self._mover: HostMover | None = None

    def index(self) -> HostIndex:
        """The scheduler's side."""
        return HostIndex(self._shelf, self._geometry)

    def mover(self, view: KVView) -> HostMover:
        """The worker's side; one per store, since entries hold the content of one device."""
        if self._mover is not None:
            raise ConfigError("a host store serves one worker; build one store for each")
        self._mover = HostMover(self._shelf, self._geometry, view)
        return self._mover

    def stats(self) -> dict[str, int]:
        """Counters as the contract names them; lookups count as hits, misses or laters, entries as blocks."""
        with self._shelf.lock:
            return {**self._shelf.counts, "used_bytes": self._shelf.used_bytes}
