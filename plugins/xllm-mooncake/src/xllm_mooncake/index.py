"""The scheduler's side: answers from what is known, asks about the rest, and never waits."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xllm_core.plugins import Hit, Later, Miss

if TYPE_CHECKING:
    from xllm_core.plugins import KVTransfer

HELD_S = 5.0
"""For a lookup a block counts as held so long after the store said so: half of the lease that its answer granted."""

BELIEVED_S = 60.0
"""A block is not offered again for so long after it was seen there; longer would keep what was evicted away for ever."""

ABSENT_S = 1.0
_MAX_NOTES = 1 << 17
_MAX_SAVING = 4096


class Knowledge:
    """What is known of keys, each for a time. Shared by index, mover and the calling thread.

    ask: begins to find out about keys; what comes of it is told to `learn` or `forget`. counts: shared counters, changed under `lock`.
    """

    def __init__(self, lookup_timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self._timeout_s = lookup_timeout_s
        self._clock = clock
        self._notes: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()
        self._asked: dict[bytes, float] = {}
        self._saving: dict[bytes, float] = {}

    def chain(self, keys: Sequence[bytes]) -> tuple[Hit | Later | Miss, list[bytes]]:
        """The answer about a chain, and the keys to ask the store about for it."""
        with self.lock:
            now_s = self._clock()
            num_held = 0
            for key in keys:
                is_held = self._is_held(key, now_s)
                if is_held is None:
                    since_s = self._asked.get(key, self._saving.get(key, now_s))
                    if now_s - since_s <= self._timeout_s:
                        return self._later(keys[num_held:], now_s)
                    self.counts["lookup_timeouts"] += 1
                if not is_held:
                    break
                num_held += 1
            self.counts["hits" if num_held else "misses"] += 1
            return (Hit(num_held) if num_held else Miss()), []

    def each(self, keys: Sequence[bytes]) -> tuple[list[bool] | Later, list[bytes]]:
        """Which are held, each for itself, and the keys to ask the store about for it."""
        with self.lock:
            now_s = self._clock()
            states = [self._is_held(key, now_s) for key in keys]
            for key, is_held in zip(keys, states, strict=True):
                if (
                    is_held is None
                    and key not in self._saving
                    and now_s - self._asked.get(key, now_s) <= self._timeout_s
                ):
                    return self._later(keys, now_s)
            return [bool(is_held) or key in self._saving for key, is_held in zip(keys, states, strict=True)], []

    def wanted(self, keys: Sequence[bytes]) -> list[bool]:
        """Which are neither known to be held nor on their way."""
        with self.lock:
            now_s, room = self._clock(), _MAX_SAVING - len(self._saving)
            answers = []
            for key in keys:
                is_held, at_s = self._notes.get(key, (False, now_s))
                is_new = key not in self._saving and not (is_held and now_s - at_s <= BELIEVED_S)
                self.counts["dropped_blocks"] += is_new and room <= 0
                answers.append(is_new and room > 0)
                room -= is_new
            return answers

    def begin_save(self, keys: Sequence[bytes]) -> None:
        """They are on their way."""
        with self.lock:
            self._saving.update(dict.fromkeys(keys, self._clock()))

    def end_save(self, keys: Sequence[bytes]) -> None:
        """They are not on their way any more."""
        with self.lock:
            for key in keys:
                self._saving.pop(key, None)

    def learn(self, keys: Sequence[bytes], are_held: Sequence[bool]) -> None:
        """The store said so just now."""
        with self.lock:
            now_s = self._clock()
            for key, is_held in zip(keys, are_held, strict=True):
                self._asked.pop(key, None)
                self._notes[key] = (is_held, now_s)
                self._notes.move_to_end(key)
            while len(self._notes) > _MAX_NOTES:
                self._notes.popitem(last=False)

    def unasked(self, keys: Sequence[bytes]) -> None:
        """Nobody will answer."""
        with self.lock:
            for key in keys:
                self._asked.pop(key, None)

    def forget(self) -> None:
        """The store may have lost everything."""
        with self.lock:
            self._notes.clear()
            self._asked.clear()

    def count(self, **amounts: int) -> None:
        """Add to counters."""
        with self.lock:
            self.counts.update(amounts)

    def _is_held(self, key: bytes, now_s: float) -> bool | None:
        """None: not known, or on its way."""
        if key in self._saving:
            return None
        is_held, at_s = self._notes.get(key, (False, float("-inf")))
        return is_held if now_s - at_s <= (HELD_S if is_held else ABSENT_S) else None

    def _later(self, keys: Sequence[bytes], now_s: float) -> tuple[Later, list[bytes]]:
        self.counts["laters"] += 1
        new = [k for k in keys if k not in self._asked and self._is_held(k, now_s) is None and k not in self._saving]
        self._asked.update(dict.fromkeys(new, now_s))
        return Later(), new


class MooncakeIndex:
    """A `KVIndex`."""

    def __init__(self, knowledge: Knowledge, is_up: Callable[[], bool], ask: Callable[[list[bytes]], None]) -> None:
        self._knowledge = knowledge
        self._is_up = is_up
        self._ask = ask

    def lookup(self, keys: Sequence[bytes]) -> Hit | Later | Miss:
        """Later at first; Hit or Miss once the store has answered, or has not within `lookup_timeout_s`. While the breaker is open, Miss."""
        if not self._is_up():
            self._knowledge.count(misses=1)
            return Miss()
        answer, unknown = self._knowledge.chain(keys)
        if unknown:
            self._ask(unknown)
        return answer

    def held(self, keys: Sequence[bytes]) -> Sequence[bool] | Later:
        """As `lookup`, for keys that are no chain."""
        if not self._is_up():
            return [False] * len(keys)
        answer, unknown = self._knowledge.each(keys)
        if unknown:
            self._ask(unknown)
        return answer

    def wants(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """Nothing while the breaker is open."""
        return self._knowledge.wanted(keys) if self._is_up() else [False] * len(keys)

    def planned(self, transfer: KVTransfer) -> None:
        """What a save brings is on its way from now on."""
        if not transfer.is_load:
            self._knowledge.begin_save(transfer.keys)

    def finished(self, ticket: int, has_succeeded: bool) -> None:
        """The mover has told what came of it already."""
