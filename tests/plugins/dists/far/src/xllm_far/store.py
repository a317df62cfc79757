"""Both sides of the store. One thread speaks with the peer; index and mover only leave it work and read what it found."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xllm_core.plugins import Hit, KVGeometry, KVView, Later, Miss
from xllm_core.types import KVTransfer

_TIMEOUT_S = 0.5


class _Line:
    """A connection that is made when it is needed. Raises OSError when the peer does not answer."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: Any = None

    def ask(self, request: Mapping[str, Any], body: bytes = b"") -> bytes | None:
        try:
            if self._file is None:
                peer = socket.socket(socket.AF_UNIX)
                peer.settimeout(_TIMEOUT_S)
                peer.connect(self._path)
                self._file = peer.makefile("rwb")
            self._file.write(json.dumps(request).encode() + b"\n" + body)
            self._file.flush()
            line = self._file.readline()
            if not line:
                raise ConnectionError("the peer has gone")
            size = json.loads(line)["size"]
            found: bytes | None = self._file.read(size) if size >= 0 else None
            return found
        except OSError:
            self._file = None  # half an answer may still be on its way
            raise


class FarStore:
    """A `KVStore`: index and mover in one."""

    def __init__(self, config: Mapping[str, Any], geometry: KVGeometry) -> None:
        self._line, self._geometry = _Line(config["socket"]), geometry
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._held: dict[bytes, bool] = {}
        self._asked: set[bytes] = set()
        self._saved: set[bytes] = set()
        self._ended: list[tuple[int, bool]] = []
        self._counts = dict.fromkeys(
            ("stored_blocks", "loaded_blocks", "evicted_blocks", "hits", "misses", "laters", "used_bytes"), 0
        )
        self._is_closed = False
        self._view: KVView | None = None
        self._line.ask({"do": "has", "keys": []})  # no peer, no store
        self._thread = threading.Thread(target=self._run, name="xllm-far", daemon=True)
        self._thread.start()

    def index(self) -> FarStore:
        return self

    def mover(self, view: KVView) -> FarStore:
        self._view = view
        return self

    def stats(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def lookup(self, keys: Sequence[bytes]) -> Hit | Later | Miss:
        """What is not known is asked for, and known later; an answer serves one chain of lookups."""
        with self._lock:
            unknown = [key for key in keys if key not in self._held]
            if unknown:
                if new := [key for key in unknown if key not in self._asked]:
                    self._asked.update(new)
                    self._work.put(lambda: self._ask(new))
                self._counts["laters"] += 1
                return Later()
            count = next((i for i, key in enumerate(keys) if not self._held[key]), len(keys))
            for key in keys:
                self._held.pop(key)
            self._counts["hits" if count else "misses"] += 1
            return Hit(count) if count else Miss()

    def held(self, keys: Sequence[bytes]) -> Sequence[bool] | Later:
        """Asked about like a chain, and kept for the lookup that follows."""
        with self._lock:
            unknown = [key for key in keys if key not in self._held]
            if new := [key for key in unknown if key not in self._asked]:
                self._asked.update(new)
                self._work.put(lambda: self._ask(new))
            return Later() if unknown else [self._held[key] for key in keys]

    def wants(self, keys: Sequence[bytes]) -> Sequence[bool]:
        with self._lock:
            return [key not in self._saved for key in keys]

    def planned(self, transfer: KVTransfer) -> None:
        """Nothing is reserved."""

    def finished(self, ticket: int, has_succeeded: bool) -> None:
        """Nothing was reserved."""

    def start(self, transfers: Sequence[KVTransfer]) -> None:
        for transfer in transfers:
            if self._is_closed:
                self._ended.append((transfer.ticket, False))
            else:
                self._work.put(lambda t=transfer: self._move(t))  # type: ignore[misc]

    def poll(self) -> Sequence[tuple[int, bool]]:
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._work.put(None)
        self._thread.join(5)

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            job()

    def _ask(self, keys: Sequence[bytes]) -> None:
        try:
            found = json.loads(self._line.ask({"do": "has", "keys": [key.hex() for key in keys]}) or b"[]")
        except OSError:
            found = [False] * len(keys)
        with self._lock:
            self._asked.difference_update(keys)
            self._held.update(zip(keys, found, strict=True))

    def _move(self, transfer: KVTransfer) -> None:
        try:
            has_succeeded = (self._load if transfer.is_load else self._save)(transfer)
        except Exception:  # noqa: BLE001  a device or a peer that fails ends the ticket
            has_succeeded = False
        with self._lock:
            self._ended.append((transfer.ticket, has_succeeded))
            for key in transfer.keys:
                self._held.pop(key, None)
            if has_succeeded:
                self._counts["loaded_blocks" if transfer.is_load else "stored_blocks"] += len(transfer.keys)
                self._saved.update(transfer.keys)
            else:
                self._saved.difference_update(transfer.keys)

    def _save(self, transfer: KVTransfer) -> bool:
        assert self._view is not None
        for i, key in enumerate(transfer.keys):
            blocks = [(g, ids[i]) for g, ids in enumerate(transfer.block_ids) if ids[i] >= 0]
            body = b"".join(self._view.read_block(g, block).numpy().tobytes() for g, block in blocks)
            self._line.ask({"do": "put", "key": key.hex(), "size": len(body)}, body)
        return True

    def _load(self, transfer: KVTransfer) -> bool:
        assert self._view is not None
        bodies = [self._line.ask({"do": "get", "key": key.hex()}) for key in transfer.keys]
        if any(body is None for body in bodies):
            return False
        for i, body in enumerate(bodies):
            at = 0
            for group, ids in enumerate(transfer.block_ids):
                if ids[i] >= 0:
                    size = self._geometry.block_bytes[group]
                    data = torch.frombuffer(bytearray((body or b"")[at : at + size]), dtype=torch.uint8)
                    self._view.write_block(group, ids[i], data)
                    at += size
        return True
