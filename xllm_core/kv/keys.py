"""Names of KV blocks: what a block holds decides its key, so that anyone who knows the tokens can compute it.

Block key (32 bytes), the same on every device and for every model::

    SHA-256( lp(b"xllm.block.1") lp(parent) lp(tokens) lp(adapter) lp(media) lp(salt) )

    lp(x)    the length of x in bytes as little-endian uint32, then x
    parent   key of the block before, 32 bytes; empty for the first block of a sequence
    tokens   the block's token ids, each as little-endian uint32
    adapter  name of the adapter that computed it, UTF-8; empty for none
    media    hash of images and sounds that reach into the block, any bytes; empty for none
    salt     what separates tenants, UTF-8; empty for none

Storage key (32 bytes), of content that rests outside the device::

    SHA-256( lp(b"xllm.store.1") lp(block key) lp(fingerprint) lp(part) )

    fingerprint  `KVGeometry.fingerprint`, UTF-8: covers model, dtype, layout and rank
    part         empty for the groups that keep every position, together; else the name of the one group, UTF-8

Lengths are written before contents, so no two different inputs give one byte string.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

_LENGTH = struct.Struct("<I")


def _prefixed(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


_BLOCK_TAG = _prefixed(b"xllm.block.1")
_STORE_TAG = _prefixed(b"xllm.store.1")
ROOT_KEY = b""


class BlockKeys:
    """Computes block keys for one block size; about a microsecond each for 16 tokens."""

    __slots__ = ("_first_head", "_head", "_middle", "_pack", "block_size")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._pack = struct.Struct(f"<{block_size}I").pack
        self._first_head = _BLOCK_TAG + _prefixed(ROOT_KEY)
        self._head = _BLOCK_TAG + _LENGTH.pack(32)
        self._middle = _LENGTH.pack(4 * block_size)

    def suffix(self, *, adapter: str = "", media: bytes = b"", salt: str = "") -> bytes:
        """The part of the hashed bytes that stays the same along a sequence; computed once per sequence."""
        return _prefixed(adapter.encode()) + _prefixed(media) + _prefixed(salt.encode())

    def key(self, parent: bytes, tokens: Sequence[int], suffix: bytes) -> bytes:
        """The key of one full block: `tokens` has `block_size` entries in [0, 2**32); `suffix` as `suffix()` made it."""
        head = self._head + parent if parent else self._first_head
        return sha256(head + self._middle + self._pack(*tokens) + suffix).digest()


def block_key(parent: bytes, tokens: Sequence[int], *, adapter: str = "", media: bytes = b"", salt: str = "") -> bytes:
    """One block key from its parts, as the module's head defines it; for routers, tools and tests."""
    keys = BlockKeys(len(tokens))
    return keys.key(parent, tokens, keys.suffix(adapter=adapter, media=media, salt=salt))


def storage_key(key: bytes, fingerprint: str, part: str = "") -> bytes:
    """The name under which a store keeps the content of block `key`."""
    return sha256(_STORE_TAG + _prefixed(key) + _prefixed(fingerprint.encode()) + _prefixed(part.encode())).digest()
