"""What a model costs by its shapes alone: bytes that a step has to read, operations that it has to do, and the time that this machine needs for them.

Nothing is measured here. A step cannot end before its bytes are read and its products are done; which of both takes longer limits it. Activations,
norms, rope and the softmax are left out: they are small beside that, and a limit may be too low but not too high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from xllm_core.plugins.contracts.kv import KVGroupSpec
from xllm_core.plugins.contracts.weights import HoldsPacked, WeightEntry

if TYPE_CHECKING:
    from xllm_core.plugins.resolve import Assembly

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # a fallback's weights do not say whose they are


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time of a step in seconds, and what sets it."""

    seconds: float
    by: Literal["memory", "products"]


@dataclass(frozen=True, slots=True)
class KVCost:
    """Of one KV group. position_bytes: keys and values of a position, all layers. pair_ops: of a new token and a position that it sees.

    window: positions that a token sees at most; None for all.
    """

    position_bytes: int
    pair_ops: int
    window: int | None = None

    def seen(self, context: float) -> float:
        """Positions that the token at this place reads."""
        return context if self.window is None else min(context, self.window)

    def pairs(self, prompt_len: int) -> float:
        """Of a prompt's tokens and what each sees."""
        closed = min(prompt_len, self.window or prompt_len)
        return closed * (closed + 1) / 2 + (prompt_len - closed) * closed


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a dense model. weight_bytes: read in a step that ends in new tokens. body_ops, head_ops: of a token, of one whose successor is wanted.

    has_peak: the products are those whose peak is probed; where they are not (weights in 8 bits or float32), memory alone sets limits, and prompts
    have none.
    """

    weight_bytes: int
    body_ops: int
    head_ops: int
    kv: tuple[KVCost, ...]
    has_peak: bool = True

    def as_json(self) -> dict[str, Any]:
        """As written beside figures."""
        return asdict(self)

    def decode(self, batch: int, context: float, read: float, peak: float) -> Limit:
        """A step of so many sequences at this context; read in bytes/s, peak in operations/s."""
        kv_bytes = sum(kv.position_bytes * kv.seen(context) for kv in self.kv)
        kv_ops = sum(kv.pair_ops * kv.seen(context) for kv in self.kv)
        return self._limit(
            self.weight_bytes + batch * kv_bytes, batch * (self.body_ops + self.head_ops + kv_ops), read, peak
        )

    def prefill(self, prompt_len: int, read: float, peak: float) -> Limit | None:
        """A prompt, to its first new token."""
        if not self.has_peak:
            return None
        kv_ops = sum(kv.pair_ops * kv.pairs(prompt_len) for kv in self.kv)
        return self._limit(self.weight_bytes, prompt_len * self.body_ops + self.head_ops + kv_ops, read, peak)

    def _limit(self, num_bytes: float, ops: float, read: float, peak: float) -> Limit:
        memory_s, products_s = num_bytes / read, ops / peak if self.has_peak else 0.0
        return Limit(memory_s, "memory") if memory_s >= products_s else Limit(products_s, "products")


def costs_of(model: str, **flat: Any) -> Costs | str:
    """Of a model under these settings, from its headers; or why its limits are not known."""
    from xllm_core.runtime.loader import check_weights, packed_parameters

    assembly = _assembled(model, flat)
    plan, config = assembly.plan, assembly.checkpoint.config
    weights = assembly.family.weight_map(config)
    sources = check_weights(assembly.checkpoint, weights)
    packed = (
        packed_parameters(assembly.checkpoint, weights, plan.quantized_kinds) if plan.quantized_kinds else frozenset()
    )
    matrices = [(entry, source) for entry, source in zip(weights.entries, sources, strict=True) if len(entry.shape) > 1]
    has_experts = any(entry.expert is not None for entry in weights.entries) or any(config.get(key) for key in _EXPERTS)
    if has_experts or any(len(entry.shape) != 2 for entry, _ in matrices):
        return "it has experts, of which a token reads a few, or weights that are no matrices"
    body = [pair for pair in matrices if pair[0].axis != "vocab"]
    head = [pair for pair in matrices if pair[0].axis == "vocab"][-1:]  # the table of embeddings, where they are tied
    if not head or "num_attention_heads" not in config:
        return "its configuration does not tell its heads"
    kv = kv_costs(assembly.kv_groups, int(config["num_attention_heads"]))
    if isinstance(kv, str):
        return kv
    bits = plan.quantization.name.rpartition("/")[2] if plan.quantization is not None else plan.dtype
    if bits not in (*_BYTES, "gguf"):
        return f"bytes of a weight in {bits} are not known here"
    quantised = {"linear", "lm_head"} & set(plan.quantized_ops)

    def size(pair: tuple[WeightEntry, str], role: str) -> int:
        entry, source = pair
        rows, columns = entry.shape
        if entry.param in packed:
            assert isinstance(assembly.checkpoint, HoldsPacked)
            return int(assembly.checkpoint.read_packed(source).blocks.nbytes)
        if bits == "int8" and role in quantised:
            return rows * (columns + 4)  # a step in float32 for each output
        return rows * columns * _BYTES[plan.dtype]

    return Costs(
        weight_bytes=sum(size(pair, "linear") for pair in body) + size(head[0], "lm_head"),
        body_ops=2 * sum(math.prod(entry.shape) for entry, _ in body), head_ops=2 * math.prod(head[0][0].shape), kv=kv,
        has_peak=plan.quantization is None and plan.dtype == "bfloat16",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that a server keeps: of its weights, each tensor once, and of a token's keys and values. block_size: tokens of a KV block."""

    weight_bytes: int
    token_bytes: int
    block_size: int


def held_of(model: str, **flat: Any) -> Held | str:
    """Of a model under these settings, from its headers; or why that cannot be told from them."""
    from xllm_core.runtime.loader import check_weights

    assembly = _assembled(model, flat)
    plan, groups = assembly.plan, assembly.kv_groups
    if plan.quantization is not None:
        return f"bytes of its weights in {plan.quantization.name} are not known here"
    if other := [group.name for group in groups if group.kind != "full"]:
        return f"its KV group {other[0]!r} does not grow with every token"
    weights = assembly.family.weight_map(assembly.checkpoint.config)
    sources = check_weights(assembly.checkpoint, weights)
    sizes = {source: math.prod(entry.shape) for entry, source in zip(weights.entries, sources, strict=True) if source}
    token_bytes = sum(
        len(group.layers) * math.prod(tensor.shape) * _BYTES[tensor.dtype]
        for group in groups
        for tensor in group.tensors
    )
    return Held(sum(sizes.values()) * _BYTES[plan.dtype], token_bytes, plan.block_size)


def _assembled(model: str, flat: dict[str, Any]) -> Assembly:
    from xllm_core.config import Settings
    from xllm_core.plugins.manager import PluginManager
    from xllm_core.plugins.resolve import assemble

    settings = Settings.from_flags(path=model, **flat)
    return assemble(settings, PluginManager.discover(settings).load())


def kv_costs(groups: Sequence[KVGroupSpec], num_heads: int) -> tuple[KVCost, ...] | str:
    """Of each group of keys and values per head; or why that is not known."""
    found = []
    for group in groups:
        if group.kind not in ("full", "sliding_window") or any(len(tensor.shape) != 2 for tensor in group.tensors):
            return f"KV group {group.name!r} does not hold keys and values of every position"
        position = sum(math.prod(tensor.shape) * _BYTES[tensor.dtype] for tensor in group.tensors)
        ops = 2 * num_heads * sum(tensor.shape[-1] for tensor in group.tensors)
        found.append(KVCost(len(group.layers) * position, len(group.layers) * ops, group.window))
    return tuple(found)
