"""Pages of the KV cache that are got before a step needs them."""

from __future__ import annotations

import torch

from xllm_core.plugins.contracts.device import LazyMemoryDevice
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec, KVTensorSpec
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime import kv_cache
from xllm_core.runtime.kv_cache import KVCache, PagesAhead, block_bytes

MIB = 1 << 20
NUM_BLOCKS = 4000


class Device(ReferenceDevice):
    """Remembers which blocks of which tensor were got."""

    def __init__(self) -> None:
        super().__init__(0)
        self.got: list[tuple[int, range]] = []
        self.tensors: list[torch.Tensor] = []

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.tensors.append(super().allocate(shape, dtype))
        return self.tensors[-1]

    def populate(self, tensor: torch.Tensor) -> None:
        for index, whole in enumerate(self.tensors):
            at, rest = divmod(tensor.data_ptr() - whole.data_ptr(), whole[0].numel() * whole.element_size())
            if 0 <= at < len(whole):
                assert rest == 0
                self.got.append((index, range(at, at + len(tensor))))

    def blocks(self, index: int) -> list[int]:
        return [block for i, part in self.got if i == index for block in part]


def made() -> tuple[Device, PagesAhead]:
    """Two layers of keys and values, 16 KiB of a block in each tensor."""
    specs = tuple(KVTensorSpec(name, (4, 128), "float16") for name in "kv")
    group = KVGroupSpec("full", "full", (0, 1), specs)
    geometry = KVGeometry((group,), 16, (NUM_BLOCKS,), (block_bytes(group, 16),), layout="BSGD", fingerprint="00")
    device = Device()
    assert isinstance(device, LazyMemoryDevice)
    return device, PagesAhead(device, KVCache(device, geometry), geometry)


def get_all(pages: PagesAhead) -> int:
    count = 0
    while pages.get_some():
        count += 1
    return count


def test_a_start_gets_a_little() -> None:
    """The first blocks of every tensor, each once, in pieces of two MiB at most."""
    device, pages = made()
    assert get_all(pages) == 8
    ahead = kv_cache.LEAST_AHEAD_BYTES // (64 << 10)
    assert all(sorted(device.blocks(i)) == list(range(ahead)) for i in range(4))
    assert max(len(part) for _, part in device.got) * (16 << 10) == 2 * MIB
    assert not pages.get_some()


def test_as_much_again_as_was_used() -> None:
    """From behind what was handed out on, nothing twice, and what steps have touched themselves not at all."""
    device, pages = made()
    get_all(pages)
    device.got.clear()
    pages.use(0, [0, 1, 999])
    pages.use(0, [5])
    get_all(pages)
    assert all(sorted(device.blocks(i)) == list(range(1000, 2000)) for i in range(4))
    device.got.clear()
    pages.use(0, [1499])
    get_all(pages)
    assert sorted(device.blocks(3)) == list(range(2000, 3000))


def test_never_more_than_the_most_or_the_cache() -> None:
    """The window is bounded by bytes, and by what there is."""
    device, pages = made()
    pages.use(0, [9])
    kept = kv_cache.MOST_AHEAD_BYTES
    try:
        kv_cache.MOST_AHEAD_BYTES = 32 * MIB
        pages.use(0, [1999])
        get_all(pages)
        assert sorted(device.blocks(0)) == list(range(2000, 2512))
    finally:
        kv_cache.MOST_AHEAD_BYTES = kept
    pages.use(0, [NUM_BLOCKS - 3])
    get_all(pages)
    assert max(device.blocks(0)) == NUM_BLOCKS - 1
    pages.use(0, [])
    assert not pages.get_some()
