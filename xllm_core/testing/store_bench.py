"""A KV store between a scheduler and a device, both played by the test: blocks that can be told apart, and calls that must not wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from xllm_core.plugins.contracts.kv import Hit, KVGeometry, KVGroupSpec, KVStore, KVTensorSpec, Later, Miss
from xllm_core.types import KVTransfer

AT_ONCE_S = 2.0
"""A call that has not returned after so long waits for something; nothing here computes for even a hundredth of it."""

PATIENCE_S = 30.0
"""For transfers, which may wait."""


class StorePeer(Protocol):
    """What an author gives the kit for a store that keeps its blocks in another process (fixture `xllm_store_peer`)."""

    settings: Mapping[str, Any]
    """Put over the plugin's table when the store is built, e.g. the peer's address."""

    def kill(self) -> None:
        """End the peer's process at once, as a crash would."""

    def restart(self) -> None:
        """Start it again, at the same address; what it held may be gone."""

    def pause(self) -> None:
        """Keep it from answering, as SIGSTOP does."""

    def resume(self) -> None:
        """Let it answer again."""


def geometry(layout: str, block_size: int, *, num_blocks: int = 16) -> KVGeometry:
    """Three groups: two that keep everything, of different sizes, and a sliding window."""
    small, large = KVTensorSpec("k", (2, 4), "float32"), KVTensorSpec("v", (2, 8), "bfloat16")
    groups = (
        KVGroupSpec("full", "full", (0, 2), (small, large)),
        KVGroupSpec("other", "full", (3,), (large,)),
        KVGroupSpec("window", "sliding_window", (1,), (small,), 9),
    )
    slot = {"k": 2 * 4 * 4, "v": 2 * 8 * 2}
    sizes = tuple(block_size * len(g.layers) * sum(slot[t.name] for t in g.tensors) for g in groups)
    return KVGeometry(groups, block_size, (num_blocks,) * 3, sizes, layout, "ab" * 32)


class ByteView:
    """A device cache as bytes. reading, writing: hooks called before a block is read or written, to make the device slow or broken."""

    def __init__(self, shape: KVGeometry, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.blocks = [
            torch.randint(0, 256, (count, size), generator=generator, dtype=torch.uint8)
            for count, size in zip(shape.num_blocks, shape.block_bytes, strict=True)
        ]
        self.reading: Callable[[], None] = lambda: None
        self.writing: Callable[[], None] = lambda: None

    def read_block(self, group: int, block_id: int) -> torch.Tensor:
        """A copy of one block: uint8, [block_bytes]."""
        self.reading()
        return self.blocks[group][block_id].clone()

    def write_block(self, group: int, block_id: int, data: torch.Tensor) -> None:
        """Restore a block; anything but its very bytes is refused."""
        self.writing()
        if data.dtype != torch.uint8 or data.numel() != self.blocks[group].shape[1]:
            raise ValueError(
                f"group {group} has blocks of {self.blocks[group].shape[1]} bytes, got {data.dtype} {tuple(data.shape)}"
            )
        self.blocks[group][block_id] = data.reshape(-1)


def keys_of(name: str, count: int) -> list[bytes]:
    """Storage keys of a chain of blocks."""
    import hashlib

    return [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(count)]


@dataclass
class StoreBench:
    """Both sides of one store. Every call is made on a thread, so that one which waits is seen and named."""

    store: KVStore
    shape: KVGeometry
    view: ByteView
    index: Any = None
    mover: Any = None
    ended: dict[int, bool] = field(default_factory=dict)
    _next_ticket: int = 0

    def __post_init__(self) -> None:
        self.index, self.mover = self.store.index(), self.store.mover(self.view)

    def at_once(self, what: str, call: Callable[[], Any]) -> Any:
        """The answer of a call that must not wait; AssertionError if it does."""
        answer: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                answer.append(call())
            except BaseException as error:  # noqa: BLE001  raised where the test waits
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(AT_ONCE_S)
        assert not thread.is_alive(), (
            f"{what} has not returned after {AT_ONCE_S:g} s; a step of the engine would wait for it"
        )
        if errors:
            raise AssertionError(f"{what} raised {type(errors[0]).__name__}: {errors[0]}") from errors[0]
        return answer[0]

    def lookup(self, keys: Sequence[bytes]) -> Hit | Later | Miss:
        """One answer."""
        found = self.at_once("lookup()", lambda: self.index.lookup(keys))
        assert isinstance(found, Hit | Later | Miss), f"lookup() gives {found!r}"
        assert not isinstance(found, Hit) or 1 <= found.num_blocks <= len(keys), f"{found} of {len(keys)} keys"
        return found

    def settled(self, keys: Sequence[bytes]) -> int:
        """Blocks of a chain that are held, once the store knows."""
        deadline_s = time.monotonic() + PATIENCE_S
        while isinstance(found := self.lookup(keys), Later):
            assert time.monotonic() < deadline_s, f"lookup() still says Later after {PATIENCE_S:g} s"
            self.poll()
            time.sleep(0.002)
        return found.num_blocks if isinstance(found, Hit) else 0

    def each(self, keys: Sequence[bytes]) -> list[bool]:
        """Which blocks are held, each for itself, once the store knows."""
        deadline_s = time.monotonic() + PATIENCE_S
        while isinstance(found := self.at_once("held()", lambda: self.index.held(keys)), Later):
            assert time.monotonic() < deadline_s, f"held() still says Later after {PATIENCE_S:g} s"
            self.poll()
            time.sleep(0.002)
        return list(found)

    def begin(self, keys: Sequence[bytes], blocks: Sequence[int], groups: Sequence[int], *, is_load: bool) -> int:
        """Plan and start a transfer; returns its ticket."""
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        ids = [list(blocks) if group in groups else [-1] * len(keys) for group in range(len(self.shape.groups))]
        transfer = KVTransfer(ticket, is_load, list(keys), ids)
        self.at_once("planned()", lambda: self.index.planned(transfer))
        self.at_once("start()", lambda: self.mover.start([transfer]))
        return ticket

    def poll(self) -> None:
        """Hear of ended transfers and tell the index."""
        for ticket, has_succeeded in self.at_once("poll()", self.mover.poll):
            assert ticket not in self.ended, f"ticket {ticket} ended twice"
            self.ended[ticket] = bool(has_succeeded)
            self.at_once("finished()", partial(self.index.finished, ticket, has_succeeded))

    def end(self, ticket: int) -> bool:
        """Wait for a transfer; True if it succeeded."""
        deadline_s = time.monotonic() + PATIENCE_S
        while ticket not in self.ended:
            assert time.monotonic() < deadline_s, (
                f"transfer {ticket} has not ended after {PATIENCE_S:g} s; its blocks stay leased"
            )
            self.poll()
            time.sleep(0.002)
        return self.ended[ticket]

    def save(self, keys: Sequence[bytes], blocks: Sequence[int], groups: Sequence[int]) -> bool:
        """Give blocks to the store and wait."""
        return self.end(self.begin(keys, blocks, groups, is_load=False))

    def load(self, keys: Sequence[bytes], blocks: Sequence[int], groups: Sequence[int]) -> bool:
        """Bring them back into other blocks, and wait."""
        return self.end(self.begin(keys, blocks, groups, is_load=True))

    def close(self) -> None:
        """End the mover."""
        self.mover.close()
