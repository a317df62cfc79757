"""Memory that blocks pass through, shared with the client's process; and the form of a stored value.

A value is what one storage key names: a header, then the blocks of its groups one after the other, each as `KVView.read_block` gives it.
The header (64 bytes) holds a mark, the number of bytes that follow, and a keyed BLAKE2b digest of storage key, sizes and bytes. A value that
was cut, altered, stored under another key, or signed with another secret does not pass, and counts as a miss.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xllm_core.plugins import ConfigError, KVGeometry

_MARK = b"xllm.kv1"
_HEADER = struct.Struct("<8sQ32s")
HEADER_BYTES = 64
_ALIGN = 4096


def part_of(geometry: KVGeometry, groups: Sequence[int]) -> tuple[int, ...]:
    """The groups that share a storage key with these: all of kind "full", or the one that is not."""
    if any(geometry.groups[group].kind == "full" for group in groups):
        return tuple(i for i, spec in enumerate(geometry.groups) if spec.kind == "full")
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one value. start: offset in the shared memory. is_for_load: which half it belongs to."""

    start: int
    is_for_load: bool


class Staging:
    """Slots in one anonymous file that both processes map. Used by several threads."""

    def __init__(self, geometry: KVGeometry, max_bytes: int, secret: str | None) -> None:
        """max_bytes: all of it; raises ConfigError if two values do not fit."""
        value_bytes = HEADER_BYTES + sum(geometry.block_bytes)
        slot_bytes = -(-value_bytes // _ALIGN) * _ALIGN
        count = max_bytes // slot_bytes // 2
        if count < 1:
            raise ConfigError(
                f"[plugin.mooncake] staging_bytes = {max_bytes} is too small: a block of {geometry.block_size} tokens takes "
                f"{value_bytes} bytes, and one must fit for each direction; set at least {2 * slot_bytes}"
            )
        self.num_bytes = 2 * count * slot_bytes
        self.num_slots = count
        self.fd = os.memfd_create("xllm-mooncake")
        os.ftruncate(self.fd, self.num_bytes)
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._view = memoryview(self._map)
        self._sizes = geometry.block_bytes
        self._key = (secret or "").encode()
        self._slot_bytes = slot_bytes
        self._lock = threading.Lock()
        self._free = {
            is_for_load: [Slot((is_for_load * count + i) * slot_bytes, is_for_load) for i in range(count)]
            for is_for_load in (False, True)
        }

    @property
    def used_bytes(self) -> int:
        """Bytes of slots that are taken."""
        with self._lock:
            return self.num_bytes - self._slot_bytes * sum(map(len, self._free.values()))

    def take(self, count: int, *, is_for_load: bool) -> list[Slot]:
        """Up to `count` free slots of one half, perhaps none."""
        with self._lock:
            free = self._free[is_for_load]
            taken = free[-count:] if count else []
            del free[len(free) - len(taken) :]
            return taken

    def give_back(self, slots: Sequence[Slot]) -> None:
        """Nobody reads or writes these any more, in either process."""
        with self._lock:
            for slot in slots:
                self._free[slot.is_for_load].append(slot)

    def pieces(self, slot: Slot, part: Sequence[int]) -> tuple[list[int], list[int]]:
        """(offsets, sizes) of header and blocks, as the store's multi-buffer calls want them."""
        offsets, sizes, at = [slot.start], [HEADER_BYTES], slot.start + HEADER_BYTES
        for group in part:
            offsets.append(at)
            sizes.append(self._sizes[group])
            at += self._sizes[group]
        return offsets, sizes

    def write(self, slot: Slot, key: bytes, part: Sequence[int], blocks: Sequence[torch.Tensor]) -> None:
        """Put a value together. blocks: one per group of `part`; raises ValueError if one has not its group's size."""
        offsets, sizes = self.pieces(slot, part)
        for group, start, size, data in zip(part, offsets[1:], sizes[1:], blocks, strict=True):
            flat = data.reshape(-1).view(torch.uint8)
            if flat.numel() != size:
                raise ValueError(f"a block of group {group} has {flat.numel()} bytes, the geometry says {size}")
            self._bytes[start : start + size].copy_(flat)
        header = _HEADER.pack(_MARK, sum(sizes[1:]), self._digest(slot, key, part))
        self._view[slot.start : slot.start + _HEADER.size] = header

    def read(self, slot: Slot, key: bytes, part: Sequence[int]) -> list[torch.Tensor] | None:
        """The blocks of a value, views of the slot; None if it is not what was stored under this key."""
        offsets, sizes = self.pieces(slot, part)
        mark, length, digest = _HEADER.unpack_from(self._map, slot.start)
        if mark != _MARK or length != sum(sizes[1:]) or digest != self._digest(slot, key, part):
            return None
        return [self._bytes[start : start + size] for start, size in zip(offsets[1:], sizes[1:], strict=True)]

    def close(self) -> None:
        """Give up the file; the mapping goes with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _digest(self, slot: Slot, key: bytes, part: Sequence[int]) -> bytes:
        offsets, sizes = self.pieces(slot, part)
        digest = hashlib.blake2b(key, digest_size=32, key=self._key)
        digest.update(struct.pack(f"<{len(sizes)}Q", *sizes))
        digest.update(self._view[offsets[1] : offsets[-1] + sizes[-1]])
        return digest.digest()
