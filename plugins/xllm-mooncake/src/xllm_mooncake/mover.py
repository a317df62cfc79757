"""The worker's side: blocks go from the device into staging, and from there to the store; and back.

Two threads: one copies between device and staging, the other calls the store. A save ends for the engine when its bytes have left the
device, before they are stored. A load ends when every block has come, passed its check and is written; or at its deadline, and then
nothing of it is written any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from xllm_core.plugins import KVGeometry, KVView
from xllm_mooncake.index import Knowledge
from xllm_mooncake.lane import Lane
from xllm_mooncake.remote import LOAD, LOOKUP, SAVE, DownError, Remote, name_of
from xllm_mooncake.staging import HEADER_BYTES, Slot, Staging, part_of

if TYPE_CHECKING:
    import torch

    from xllm_core.plugins import KVTransfer

_log = logging.getLogger("xllm_mooncake")
_BATCH = 32
_ABSENT = -704
_LAND, _STAGE = range(2)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One storage key of a transfer. part: the groups of its value. blocks: group -> device block, for those that the transfer names."""

    key: bytes
    part: tuple[int, ...]
    blocks: Mapping[int, int]


@dataclass(slots=True)
class _Move:
    """A transfer. at: entries before it are done. is_touching: the device is being read or written. is_over: its end was reported."""

    ticket: int
    is_load: bool
    entries: list[_Entry]
    deadline_s: float
    at: int = 0
    is_touching: bool = False
    is_over: bool = False
    staged: list[tuple[_Entry, Slot]] = field(default_factory=list)

    def next_entries(self) -> list[_Entry]:
        return self.entries[self.at : self.at + _BATCH]


class MooncakeMover:
    """A `KVMover`."""

    def __init__(
        self, settings: Mapping[str, Any], geometry: KVGeometry, view: KVView, *, knowledge: Knowledge, remote: Remote, staging: Staging
    ) -> None:  # fmt: skip
        self._load_timeout_s: float = settings["load_timeout_s"]
        self._save_timeout_s: float = settings["save_timeout_s"]
        self._geometry = geometry
        self._view = view
        self._knowledge = knowledge
        self._remote = remote
        self._staging = staging
        self._lock = threading.Lock()
        self._moves: dict[int, _Move] = {}
        self._ended: list[tuple[int, bool]] = []
        self._waiting: dict[bool, deque[_Move]] = {True: deque(), False: deque()}  # by is_load: for a free slot
        self._is_closed = False
        self._copies = Lane("xllm-mooncake-copies", 2)

    def start(self, transfers: Sequence[KVTransfer]) -> None:
        """Queue them; after `close` they fail at once."""
        for transfer in transfers:
            timeout_s = self._load_timeout_s if transfer.is_load else self._save_timeout_s
            move = _Move(transfer.ticket, transfer.is_load, self._entries(transfer), time.monotonic() + timeout_s)
            with self._lock:
                if self._is_closed:
                    self._ended.append((move.ticket, False))
                    continue
                self._moves[move.ticket] = move
            self._go_on(move)

    def poll(self) -> Sequence[tuple[int, bool]]:
        """Tickets that ended; those whose time is over end here, unless the device is being touched for them."""
        now_s = time.monotonic()
        with self._lock:
            overdue = [m for m in self._moves.values() if now_s > m.deadline_s and not m.is_touching]
            for move in overdue:
                self._report(move, False)
            ended, self._ended = self._ended, []
        for move in overdue:
            self._give_up(move)
        return ended

    def close(self) -> None:
        """End threads and process, fail what is under way. May be called again."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._remote.close()
        if not self._copies.close(0.4):
            _log.warning("a copy of KV blocks goes on after close; its blocks stay leased")
        with self._lock:
            for move in list(self._moves.values()):
                if not move.is_touching:
                    self._report(move, False)
        self._staging.close()

    # ---- both ways ---------------------------------------------------------------------------------------------------------------

    def _entries(self, transfer: KVTransfer) -> list[_Entry]:
        entries = []
        for i, key in enumerate(transfer.keys):
            blocks = {group: ids[i] for group, ids in enumerate(transfer.block_ids) if ids[i] >= 0}
            entries.append(_Entry(key, part_of(self._geometry, tuple(blocks)), blocks))
        return entries

    def _go_on(self, move: _Move) -> None:
        if move.is_load:
            self._remote.put(LOAD, partial(self._fetch, move))
        else:
            self._copies.put(_STAGE, partial(self._stage, move))

    def _report(self, move: _Move, has_succeeded: bool) -> None:
        """Once per move; the caller has the lock."""
        if not move.is_over:
            move.is_over = True
            del self._moves[move.ticket]
            self._ended.append((move.ticket, has_succeeded))

    def _end(self, move: _Move, has_succeeded: bool) -> None:
        with self._lock:
            move.is_touching = False
            self._report(move, has_succeeded)
        if not has_succeeded:
            self._give_up(move)

    def _give_up(self, move: _Move) -> None:
        if move.is_load:
            self._knowledge.count(failed_loads=1)
        else:
            left = [entry.key for entry in move.entries[move.at :]]
            self._knowledge.count(dropped_blocks=len(left))
            self._knowledge.end_save(left)

    def _touch(self, move: _Move) -> bool:
        """Say that the device is touched from now on; False if the move is over."""
        with self._lock:
            move.is_touching = not move.is_over
            return move.is_touching

    def _let_go(self, move: _Move) -> None:
        with self._lock:
            move.is_touching = False

    def _give_back(self, slots: Sequence[Slot]) -> None:
        """Slots are free; whoever waited for some goes on."""
        self._staging.give_back(slots)
        for is_load in {slot.is_for_load for slot in slots}:
            with self._lock:
                waiting, self._waiting[is_load] = self._waiting[is_load], deque()
            for move in waiting:
                self._go_on(move)

    def _take(self, move: _Move, count: int) -> list[Slot]:
        """Slots for the next entries; with none, the move waits until some are given back."""
        with self._lock:  # under the lock, so that none is given back between looking and waiting
            slots = self._staging.take(count, is_for_load=move.is_load)
            if not slots:
                self._waiting[move.is_load].append(move)
        return slots

    # ---- device to store ---------------------------------------------------------------------------------------------------------

    def _stage(self, move: _Move) -> None:
        """On the copying thread: as many blocks as there is room for."""
        while move.at < len(move.entries):
            if time.monotonic() > move.deadline_s or not self._remote.is_up:
                self._end(move, False)
                return
            slots = self._take(move, len(move.next_entries()))
            if not slots:
                return
            if not self._touch(move):
                self._give_back(slots)
                return
            staged: list[tuple[_Entry, Slot]] = []
            try:
                for entry, slot in zip(move.next_entries(), slots, strict=False):
                    blocks = [self._view.read_block(group, entry.blocks[group]) for group in entry.part]
                    self._staging.write(slot, entry.key, entry.part, blocks)
                    staged.append((entry, slot))
            except Exception:  # noqa: BLE001  whatever the device raises, the ticket ends, and it is logged
                _log.exception("save %d: a block could not be read from the device", move.ticket)
                self._give_back(slots)
                self._end(move, False)
                return
            self._let_go(move)
            move.at += len(staged)
            if not self._remote.put(SAVE, partial(self._store, staged)):
                return
        self._end(move, True)

    def _store(self, staged: Sequence[tuple[_Entry, Slot]]) -> None:
        """On the calling thread: what nobody has stored yet."""
        keys, slots = [entry.key for entry, _ in staged], [slot for _, slot in staged]
        is_late = False
        try:
            held = self._remote.call("exist", timeout_s=self._save_timeout_s, keys=list(map(name_of, keys)))
            new = [pair for pair, code in zip(staged, held, strict=True) if code != 1]
            codes = self._put(new, slots) if new else []
            stored = [entry.key for (entry, _), code in zip(new, codes, strict=True) if code == 0]
            there = [key for key, code in zip(keys, held, strict=True) if code == 1] + stored
            self._knowledge.count(stored_blocks=len(stored), failed_saves=len(new) - len(stored))
            self._knowledge.learn(there, [True] * len(there))
        except DownError as error:
            self._knowledge.count(failed_saves=len(staged))
            is_late = error.is_late
        finally:
            self._knowledge.end_save(keys)
            if not is_late:
                self._give_back(slots)

    def _put(self, staged: Sequence[tuple[_Entry, Slot]], slots: Sequence[Slot]) -> list[int]:
        pieces = [self._staging.pieces(slot, entry.part) for entry, slot in staged]
        return self._remote.call(
            "put", timeout_s=self._save_timeout_s, on_late=partial(self._give_back, slots),
            keys=[name_of(entry.key) for entry, _ in staged], offsets=[p[0] for p in pieces], sizes=[p[1] for p in pieces],
        )  # fmt: skip

    # ---- store to device ---------------------------------------------------------------------------------------------------------

    def _fetch(self, move: _Move) -> None:
        """On the calling thread: the next blocks of a load."""
        left_s = move.deadline_s - time.monotonic()
        if move.is_over:
            return
        if left_s <= 0 or not self._remote.is_up:
            self._end(move, False)
            return
        slots = self._take(move, len(move.next_entries()))
        if not slots:
            return
        pairs = list(zip(move.next_entries(), slots, strict=False))
        pieces = [self._staging.pieces(slot, entry.part) for entry, slot in pairs]
        try:
            codes = self._remote.call(
                "get", timeout_s=left_s, on_late=partial(self._give_back, slots),
                keys=[name_of(entry.key) for entry, _ in pairs], offsets=[p[0] for p in pieces], sizes=[p[1] for p in pieces],
            )  # fmt: skip
        except DownError as error:
            if not error.is_late:
                self._give_back(slots)
            self._end(move, False)
            return
        wrong = [(entry, code) for (entry, _), code, p in zip(pairs, codes, pieces, strict=True) if code != sum(p[1])]
        if wrong:
            self._give_back(slots)
            self._end(move, False)
            self._look_into(wrong)
            return
        if not self._copies.put(_LAND, partial(self._land, move, pairs)):
            self._give_back(slots)

    def _look_into(self, wrong: Sequence[tuple[_Entry, int]]) -> None:
        """Keys that gave no value of their size: gone, out of reach, or cut. What was cut is taken out, or it would stay: keys are written once."""
        keys = [entry.key for entry, _ in wrong]
        self._knowledge.learn(keys, [False] * len(keys))
        unclear = [entry for entry, code in wrong if code != _ABSENT]
        if not unclear:
            return
        try:
            sizes = self._remote.call("size", timeout_s=self._save_timeout_s, keys=[name_of(e.key) for e in unclear])
        except DownError:
            return
        expected = [HEADER_BYTES + sum(self._geometry.block_bytes[group] for group in e.part) for e in unclear]
        self._throw_out([e.key for e, size, want in zip(unclear, sizes, expected, strict=True) if 0 <= size != want])

    def _land(self, move: _Move, pairs: Sequence[tuple[_Entry, Slot]]) -> None:
        """On the copying thread: check all, then write all."""
        slots = [slot for _, slot in pairs]
        if not self._touch(move):
            self._give_back(slots)
            return
        try:
            values = [self._staging.read(slot, entry.key, entry.part) for entry, slot in pairs]
            if bad := [entry.key for (entry, _), value in zip(pairs, values, strict=True) if value is None]:
                self._remote.put(LOOKUP, partial(self._throw_out, bad))
                self._end(move, False)
                return
            for (entry, _), value in zip(pairs, values, strict=True):
                self._write(entry, value or [])
        except Exception:  # noqa: BLE001  whatever the device raises, the ticket ends, and it is logged
            _log.exception("load %d: a block could not be written to the device", move.ticket)
            self._end(move, False)
            return
        finally:
            self._give_back(slots)
        self._let_go(move)
        self._knowledge.count(loaded_blocks=len(pairs))
        move.at += len(pairs)
        if move.at < len(move.entries):
            self._go_on(move)
        else:
            self._end(move, True)

    def _write(self, entry: _Entry, value: Sequence[torch.Tensor]) -> None:
        for group, data in zip(entry.part, value, strict=True):
            if group in entry.blocks:
                self._view.write_block(group, entry.blocks[group], data)

    def _throw_out(self, keys: Sequence[bytes]) -> None:
        """On the calling thread: values that are not what was stored."""
        if not keys:
            return
        _log.warning(
            "%d values of the Mooncake store are cut or altered; they are taken out and computed again", len(keys)
        )
        self._knowledge.count(bad_values=len(keys))
        self._knowledge.learn(keys, [False] * len(keys))
        try:
            self._remote.call("remove", timeout_s=self._save_timeout_s, keys=list(map(name_of, keys)))
        except DownError:
            return  # they are found again, and thrown out then
