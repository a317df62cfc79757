"""A model driven by hand: paged KV, a block table per sequence, no engine. What the runner does, in the fewest lines.

Also several ranks of it in one process, each on a thread: every declared parallel axis, cut and put together again, must change nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from xllm_core.plugins.contracts.attention import AttentionGeometry, AttentionKernel, BatchLayout
from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.kv import KVGeometry, KVGroupSpec
from xllm_core.plugins.contracts.model import ForwardContext, ModelFamily
from xllm_core.plugins.contracts.ops import REFERENCE_OPS
from xllm_core.plugins.contracts.weights import Checkpoint
from xllm_core.reference import ops as reference_ops
from xllm_core.reference.attention import ReferenceAttention
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.kv_cache import KVCache
from xllm_core.runtime.loader import check_weights, load_weights
from xllm_core.runtime.parts import CoreParts

WORLD = 2


def built_ops(device: DeviceBackend) -> dict[str, Any]:
    """Every op of the reference, those too that only some models ask for."""
    return {name: getattr(reference_ops, target.partition(":")[2])(device) for name, target in REFERENCE_OPS.items()}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a harness runs on. unwritten: what the cache holds where nothing was stored."""

    device: DeviceBackend
    ops: Mapping[str, Any]
    kernel: Callable[[DeviceBackend, AttentionGeometry], AttentionKernel]
    layout: str = "BSGD"
    unwritten: float = float("nan")


def reference_machine() -> Machine:
    """The reference, whose kernel never reads what was not written."""
    device = ReferenceDevice(0)
    return Machine(device, built_ops(device), ReferenceAttention)


class Harness:
    """One model with room for `num_seqs` sequences of `max_len` tokens; blocks are dealt out in a scrambled order."""

    def __init__(
        self, family: ModelFamily, checkpoint: Checkpoint, *, dtype: str = "float32", num_seqs: int = 4, max_len: int = 64,
        block_size: int = 4, config: Mapping[str, Any] | None = None, machine: Machine | None = None, **ranks: Any,
    ) -> None:  # fmt: skip
        config = checkpoint.config if config is None else config
        check_weights(checkpoint, family.weight_map(config))
        machine = machine or reference_machine()
        device = self._device = machine.device
        world_size = ranks.get("world_size", 1)
        groups = [self._shared_out(group, world_size) for group in family.kv_groups(config, dtype)]
        self.block_size, self._groups = block_size, [group.name for group in groups]
        self._kernels = {}
        for name, facts in family.attention(config).items():
            heads = {key: max(1, facts[key] // world_size) for key in ("num_heads", "num_kv_heads")}
            geometry = AttentionGeometry(
                **{**facts, **heads}, block_size=block_size, dtype=dtype, layout=machine.layout
            )
            self._kernels[name] = machine.kernel(device, geometry)
        self.parts = CoreParts(device, dtype, machine.ops, self._kernels, **ranks)
        self.model = family.build(config, self.parts)
        self.report = load_weights(checkpoint, family.weight_map(config), self.parts)
        blocks_each = -(-max_len // block_size)
        num_blocks = num_seqs * blocks_each + 1
        counts = (num_blocks,) * len(groups)
        cache = KVCache(device, KVGeometry(tuple(groups), block_size, counts, (), machine.layout, ""))
        for tensor in (tensor for group in range(len(groups)) for tensor in cache.tensors(group)):
            tensor.fill_(machine.unwritten)  # whatever was not written must never be read
        self.parts.bind_kv(cache)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(7))[: num_seqs * blocks_each]
        self._tables = order.view(num_seqs, blocks_each).to(torch.int32)
        self._lens = [0] * num_seqs

    @staticmethod
    def _shared_out(group: KVGroupSpec, world_size: int) -> KVGroupSpec:
        """The group as one rank holds it: its share of the KV heads."""
        tensors = tuple(replace(t, shape=(max(1, t.shape[0] // world_size), *t.shape[1:])) for t in group.tensors)
        return replace(group, tensors=tensors)

    @torch.inference_mode()
    def step(self, new: Mapping[int, Sequence[int]], *, all_logits: bool = True) -> dict[int, torch.Tensor]:
        """Feed new tokens to sequences; returns logits [new tokens, vocab] per sequence. Without `all_logits` those of its last token alone,
        and the last layer is told so."""
        rows, to_device = list(new), self._device.to_device
        query = torch.tensor([len(new[row]) for row in rows], dtype=torch.int32)
        kv = torch.tensor([self._lens[row] + len(new[row]) for row in rows], dtype=torch.int32)
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), query.cumsum(0).to(torch.int32)))
        positions = torch.cat([torch.arange(self._lens[row], self._lens[row] + len(new[row])) for row in rows])
        owner = torch.repeat_interleave(torch.tensor(rows), query.long())
        slots = self._tables[owner, positions // self.block_size].long() * self.block_size + positions % self.block_size
        layout = BatchLayout(query, kv, starts, self._tables[rows])
        plans = {name: kernel.plan(layout) for name, kernel in self._kernels.items()}
        ctx = ForwardContext(to_device(positions), dict.fromkeys(self._groups, to_device(slots)), plans)
        h = self.model.embed(to_device(torch.tensor([token for row in rows for token in new[row]])))
        wanted = to_device(starts[1:].long() - 1)
        for layer in self.model.layers[:-1]:
            h = layer(h, ctx)
        h = self.model.layers[-1](h, ctx if all_logits else replace(ctx, wanted=wanted))
        for row in rows:
            self._lens[row] += len(new[row])
        if not all_logits:
            last = self.model.head(h if len(h) == len(rows) else h[wanted])
            return {row: last[index : index + 1] for index, row in enumerate(rows)}
        return dict(zip(rows, torch.split(self.model.head(h), query.tolist()), strict=True))


class Ring:
    """What ranks exchange: each lays down its tensor, all read all. A rank that dies breaks the barrier for the others."""

    def __init__(self, world_size: int = WORLD) -> None:
        self._barrier = threading.Barrier(world_size, timeout=20)
        self._held: list[Any] = [None] * world_size

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensors, by rank."""
        self._held[rank] = tensor
        self._barrier.wait()
        everybody = list(self._held)
        self._barrier.wait()
        return everybody

    def abort(self) -> None:
        """Let nobody wait for a rank that has died."""
        self._barrier.abort()


def run_ranks(family: ModelFamily, checkpoint: Checkpoint, tokens: Sequence[int], **options: Any) -> list[torch.Tensor]:
    """Logits [tokens, vocab] as each of `WORLD` ranks sees them, the prompt in two chunks. options: of `Harness`.

    Raises what the rank that failed first raised.
    """
    ring, half = Ring(), len(tokens) // 2 + 1

    def run(rank: int) -> torch.Tensor:
        try:
            harness = Harness(
                family, checkpoint, world_size=WORLD, rank=rank, all_reduce=lambda tensor: sum(ring.exchange(rank, tensor)),
                all_gather=lambda tensor: torch.cat(ring.exchange(rank, tensor), -1), **options,
            )  # fmt: skip
            return torch.cat([harness.step({0: tokens[:half]})[0], harness.step({0: tokens[half:]})[0]])
        except BaseException:
            ring.abort()
            raise

    with ThreadPoolExecutor(WORLD) as pool:
        futures = [pool.submit(run, rank) for rank in range(WORLD)]
        results, errors = [], []
        for future in futures:
            error = future.exception()
            errors.append(error) if error is not None else results.append(future.result())
    if errors:  # the rank that failed first, not the one that waited for it in vain
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
