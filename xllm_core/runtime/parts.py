"""`contracts.model.Parts` as one worker builds it: ops, kernels, parameters and collectives, bound together once.

Life: construct -> the family's `build` asks for everything -> the loader fills `parameters` -> `finish` lays weights out ->
`bind_kv` -> forwards. Asking twice for one name, or for a group without kernel, is a bug and raises at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from xllm_core.errors import ConfigError, IntegrityError, WeightMismatchError
from xllm_core.plugins.contracts.attention import AttentionKernel, KVSegments
from xllm_core.plugins.contracts.device import DeviceBackend
from xllm_core.plugins.contracts.model import Attention, Experts, ForwardContext, Linear
from xllm_core.plugins.contracts.ops import GivesRows, KeepsPrepared, LinearOp, MoeExpertsOp
from xllm_core.plugins.contracts.weights import Axis, PackedTensor
from xllm_core.runtime.dtypes import torch_dtype
from xllm_core.runtime.kv_cache import KVCache

# The dimension that each axis divides.
_DIVIDED_DIM: Mapping[Axis, int] = {"column": 0, "vocab": 0, "expert": 0, "row": 1}


@dataclass(slots=True)
class Parameter:
    """One named weight of this rank. `shape` is full, `tensor` this rank's share; None once an op has taken the weight over.

    packed: (first row, rows as the file packs them) of this rank's share, for a weight that is served so; `tensor` is then there only for an
    embedding that reads the same table.
    """

    name: str
    shape: tuple[int, ...]
    axis: Axis
    tensor: torch.Tensor | None
    physical_of: torch.Tensor | None = None  # where each expert lies, for axis "expert"
    packed: list[tuple[int, PackedTensor]] | None = None

    @property
    def divided_dim(self) -> int | None:
        """The dimension that ranks share out; None when every rank holds all of it."""
        return _DIVIDED_DIM.get(self.axis)


@dataclass(frozen=True, slots=True)
class WeightsInFormat:
    """The format that linear maps have their weights in. ops: what reads it instead of "linear", "lm_head" and "linear_silu_mul"; empty for none.

    quantize: turns a weight into it. stack: of a format that files hold, puts packed rows together; it is for the parameters in `packed` alone.
    """

    ops: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None
    stack: Callable[[Sequence[PackedTensor]], tuple[torch.Tensor, ...]] | None = None
    packed: frozenset[str] = frozenset()


class CoreParts:
    """Everything a model is made of, on one device, for one rank.

    ops: built callables by name. kernels: built attention kernels by KV group, made for this rank's share of the heads.
    all_reduce(tensor) returns the sum over ranks, all_gather(tensor) the concatenation of last dimensions; needed if `world_size` > 1.
    weights: the format that was chosen, by itself none. kv_write: the op that stores into the cache, whose fusion with `rope` may be there too.
    """

    def __init__(
        self,
        device: DeviceBackend,
        dtype: torch.dtype | str,
        ops: Mapping[str, Callable[..., Any]],
        kernels: Mapping[str, AttentionKernel],
        *,
        world_size: int = 1,
        rank: int = 0,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        all_gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
        weights: WeightsInFormat | None = None,
        kv_write: str = "kv_write",
    ) -> None:
        if world_size > 1 and (all_reduce is None or all_gather is None):
            raise IntegrityError(f"{world_size} ranks need both all_reduce and all_gather")
        self.device, self.torch_device = device, device.facts().torch_device
        self.dtype = torch_dtype(dtype) if isinstance(dtype, str) else dtype
        self.world_size, self.rank = world_size, rank
        self.parameters: dict[str, Parameter] = {}
        self._handed_out: dict[str, torch.Tensor] = {}
        self._embeddings: dict[str, _BoundEmbedding] = {}
        self._ops, self._kernels = ops, kernels
        self._format = weights or WeightsInFormat()
        self._kv_write = kv_write
        self._all_reduce = all_reduce or _identity
        self._all_gather = all_gather or _identity
        self._linears: list[_BoundLinear] = []
        self._experts: dict[str, _BoundExperts] = {}
        self._attentions: dict[tuple[str, int], _BoundAttention] = {}

    # What models call.

    def share(self, size: int) -> int:
        """This rank's part of a divided dimension."""
        if size % self.world_size:
            raise ConfigError(
                f"a dimension of {size} does not divide over {self.world_size} ranks; use a number of ranks that divides it"
            )
        return size // self.world_size

    def op(self, name: str, *, unfused: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """A bound op."""
        if name not in self._ops:
            if unfused is not None:
                return unfused
            raise IntegrityError(f"the model asks for the op {name!r}, the plan holds {', '.join(sorted(self._ops))}")
        return self._ops[name]

    def parameter(
        self, name: str, shape: Sequence[int], axis: Axis = "replicated", *, is_float32: bool = False
    ) -> torch.Tensor:
        """A parameter that the model keeps and hands to ops itself."""
        tensor = self._new_parameter(name, shape, axis, is_float32=is_float32).tensor
        assert tensor is not None
        self._handed_out[name] = tensor
        return tensor

    def linear(self, name: str, in_features: int, out_features: int, *, axis: Axis, has_bias: bool = False) -> Linear:
        """A linear map; with axis "row" its result is summed over ranks, and the bias is added by rank 0 alone."""
        weight = self._new_parameter(f"{name}.weight", (out_features, in_features), axis, may_be_packed=True)
        bias_axis: Axis = "replicated" if axis == "row" else axis
        bias = self._new_parameter(f"{name}.bias", (out_features,), bias_axis) if has_bias else None
        is_added_here = axis != "row" or self.rank == 0
        after = self._all_reduce if axis == "row" else _identity
        return self._product("linear", weight, bias if is_added_here else None, after)

    def linear_silu_mul(self, name: str, in_features: int, inner: int, *, has_bias: bool = False) -> Linear:
        """By the fusion of that name where one was chosen, else by its two ops."""
        weight = self._new_parameter(f"{name}.weight", (2 * inner, in_features), "column", may_be_packed=True)
        bias = self._new_parameter(f"{name}.bias", (2 * inner,), "column") if has_bias else None
        if "linear_silu_mul" in (self._ops_for(weight) or self._ops):
            return self._product("linear_silu_mul", weight, bias, _identity)
        return self._product("linear", weight, bias, self.op("silu_mul"))

    def router(self, name: str, hidden: int, num_experts: int) -> Linear:
        """A float32 map that every rank computes: all must send a token to the same experts."""
        weight = self._new_parameter(f"{name}.weight", (num_experts, hidden), "replicated", is_float32=True)
        return self._bind(_BoundLinear(self.op("linear_float32"), weight, None, _identity))

    def experts(self, name: str, num_experts: int, hidden: int, inner: int) -> Experts:
        """Each rank holds consecutive places of the table; tokens for experts elsewhere add nothing here, and the sum over ranks brings them."""
        gate_up = self._new_parameter(f"{name}.gate_up", (num_experts, 2 * inner, hidden), "expert")
        down = self._new_parameter(f"{name}.down", (num_experts, hidden, inner), "expert")
        first = self.rank * self.share(num_experts)
        bound = _BoundExperts(
            self.op("moe_experts"), gate_up, down, first, self._all_reduce if self.world_size > 1 else None
        )
        gate_up.physical_of = down.physical_of = bound.physical_of
        self._experts[name] = bound
        return bound

    def embedding(self, name: str, num_embeddings: int, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A table divided over the vocabulary."""
        parameter = self._new_parameter(f"{name}.weight", (num_embeddings, size), "vocab")
        assert parameter.tensor is not None
        table, look_up = parameter.tensor, self.op("embedding")
        self._handed_out[parameter.name] = table
        if self.world_size == 1:
            return self._embeddings.setdefault(parameter.name, _BoundEmbedding(look_up, table))
        first, all_reduce = self.rank * len(table), self._all_reduce

        def embed(ids: torch.Tensor) -> torch.Tensor:
            is_mine = (ids >= first) & (ids < first + len(table))
            rows = look_up(torch.where(is_mine, ids - first, 0), table)
            return all_reduce(rows * is_mine.unsqueeze(-1))

        return embed

    def lm_head(self, name: str, size: int, vocab_size: int, *, tied_to: str | None = None) -> Linear:
        """The output projection; `tied_to` names the embedding, as given to `embedding`, whose table it multiplies with."""
        if tied_to is None:
            weight = self._new_parameter(f"{name}.weight", (vocab_size, size), "vocab", may_be_packed=True)
        else:
            weight = self.parameters[f"{tied_to}.weight"]
            if weight.name in self._format.packed and "lm_head" in self._format.ops:
                weight.packed = []  # beside the table of the embedding
        if "lm_head" in self._ops_for(weight):
            return self._product("lm_head", weight, None, self._all_gather)
        product: Any = self.op("lm_head", unfused=self.op("linear"))
        head = self._bind(_BoundLinear(product, weight, None, self._all_gather))
        if weight.name in self._embeddings and isinstance(product, GivesRows):
            self._embeddings[weight.name].head = head
            del self._handed_out[weight.name]
        return head

    def attention(
        self, group: str, layer: int, *, num_heads: int, num_kv_heads: int, head_size: int, scale: float,
        sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Attention:  # fmt: skip
        """One layer's attention. Geometry was settled when the group's kernel was chosen; what is checked here is that there is one."""
        if group not in self._kernels:
            raise IntegrityError(
                f"layer {layer} asks for KV group {group!r}, kernels exist for {sorted(self._kernels)}"
            )
        if (group, layer) in self._attentions:
            raise IntegrityError(f"layer {layer} asks twice for attention in KV group {group!r}")
        write = self.op(self._kv_write)
        store = self.op(f"rope_{self._kv_write}", unfused=_rope_then_write(self.op("rope"), write))
        bound = _BoundAttention(group, self._kernels[group], write, store)
        self._attentions[group, layer] = bound
        return bound

    # What the worker calls.

    def finish(self) -> None:
        """Hand filled weights to their ops one after the other, and let go of each at once: packing needs room for one weight, not all."""
        num_users = Counter(linear.weight.name for linear in self._linears)
        for linear in self._linears:
            linear.prepare()
            num_users[linear.weight.name] -= 1
            if (
                num_users[linear.weight.name] == 0
            ):  # a tied table is read by the embedding, which has its own hold on it
                linear.weight.tensor = linear.weight.packed = None
        for experts in self._experts.values():
            experts.prepare()
        self._let_go()

    def layouts(self) -> list[str] | None:
        """Which op lays out which weight, and how; None where one cannot keep what it prepared."""
        users = self._by_name()
        ops = [user.op for user in users.values()]
        if not all(isinstance(op, KeepsPrepared) for op in ops):
            return None
        return [f"{name}: {type(op).__name__}, {op.layout}" for name, op in zip(users, ops, strict=True)]

    def handed_out(self) -> Mapping[str, torch.Tensor]:
        """Parameters that a model holds itself, by name; they stay where they are."""
        return self._handed_out

    def kept(self) -> dict[str, Mapping[str, torch.Tensor | int]]:
        """What ops have prepared, after `finish`, where `layouts` says that they can tell."""
        return {name: user.op.kept(user.prepared) for name, user in self._by_name().items()}

    def finish_with(self, kept: Mapping[str, Mapping[str, torch.Tensor | int]]) -> None:
        """Instead of `finish`: with what `kept` told of equal parts. What is handed out is filled already. KeyError, TypeError: it does not fit."""
        users = self._by_name()
        prepared = {name: user.op.restored(kept[name]) for name, user in users.items()}
        for name, user in users.items():
            user.prepared = prepared[name]
        self._let_go()

    def _let_go(self) -> None:
        for parameter in self.parameters.values():
            parameter.tensor = parameter.packed = None
        for embedding in self._embeddings.values():
            embedding.let_go()

    def _by_name(self) -> dict[str, Any]:
        """Whatever has prepared weights. A tied table has two users."""
        linears = {f"{i} {linear.weight.name}": linear for i, linear in enumerate(self._linears)}
        return {**linears, **self._experts}

    def bind_kv(self, cache: KVCache) -> None:
        """Give every attention layer its cache tensors; may be called again after a reallocation."""
        for (_, layer), attention in self._attentions.items():
            attention.segments = KVSegments(own=cache.layers[layer])

    def expert_counts(self) -> dict[str, torch.Tensor]:
        """Per layer of experts, by the name it was built under: tokens that each expert held here has got, [E] int64 on the host."""
        return {name: experts.counts.cpu() for name, experts in self._experts.items()}

    def _new_parameter(
        self, name: str, shape: Sequence[int], axis: Axis, *, is_float32: bool = False, may_be_packed: bool = False
    ) -> Parameter:
        if name in self.parameters:
            raise IntegrityError(f"the model asks twice for the parameter {name!r}")
        parameter = Parameter(name, tuple(shape), axis, None)
        local = list(shape)
        if (dim := parameter.divided_dim) is not None:
            local[dim] = self.share(local[dim])
        if may_be_packed and name in self._format.packed:
            parameter.packed = []
        else:
            parameter.tensor = self.device.allocate(local, torch.float32 if is_float32 else self.dtype)
        self.parameters[name] = parameter
        return parameter

    def _product(
        self, role: str, weight: Parameter, bias: Parameter | None, after: Callable[[torch.Tensor], torch.Tensor]
    ) -> _BoundLinear:
        """By the op that reads the chosen format, where one does."""
        name = self._ops_for(weight).get(role)
        bound = _BoundLinear(self.op(name or role), weight, bias, after, self._formatted if name is not None else None)
        return self._bind(bound)

    def _ops_for(self, weight: Parameter) -> Mapping[str, str]:
        """The ops that read this weight in the chosen format; none for one that stays as it is."""
        is_in_format = self._format.stack is None or weight.packed is not None
        return self._format.ops if is_in_format else {}

    def _formatted(self, weight: Parameter) -> tuple[torch.Tensor, ...]:
        """A weight in the chosen format, on the device."""
        if self._format.stack is None or weight.packed is None:
            assert self._format.quantize is not None and weight.tensor is not None
            return self._format.quantize(weight.tensor)
        rows = sorted(weight.packed, key=lambda piece: piece[0])
        stacked = self._format.stack([tensor for _, tensor in rows])
        if not all(bool(tensor.isfinite().all()) for tensor in stacked if tensor.is_floating_point()):
            raise WeightMismatchError(
                f"the packed rows of {weight.name!r} hold scales that are not finite; the file is damaged"
            )
        return tuple(self.device.to_device(tensor) for tensor in stacked)

    def _bind(self, linear: _BoundLinear) -> _BoundLinear:
        self._linears.append(linear)
        return linear


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _rope_then_write(rope: Callable[..., Any], kv_write: Callable[..., Any]) -> Callable[..., Any]:
    """What the fusion `rope_kv_write` stands for."""

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        caches: tuple[torch.Tensor, ...], slots: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        rotated: torch.Tensor
        rotated, k = rope(q, k, cos, sin)
        kv_write((k, v), caches, slots)
        return rotated

    return call


class _BoundLinear:
    """A linear map with its laid out weight."""

    def __init__(
        self,
        op: Callable[..., Any],
        weight: Parameter,
        bias: Parameter | None,
        after: Callable[[torch.Tensor], torch.Tensor],
        formatted: Callable[[Parameter], Any] | None = None,
    ) -> None:
        self.op: LinearOp = op  # type: ignore[assignment]  # the table holds callables; this one also prepares
        self.weight, self._bias, self._after, self._formatted = weight, bias, after, formatted
        self.prepared: Any = None

    def prepare(self) -> None:
        weight: Any = self.weight.tensor if self._formatted is None else self._formatted(self.weight)
        assert weight is not None
        self.prepared = self.op.prepare(weight, self._bias.tensor if self._bias else None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._after(self.op(x, self.prepared))


class _BoundEmbedding:
    """A table, or from `let_go` on that of the head it is tied to. head: one whose op `GivesRows`, if any."""

    def __init__(self, look_up: Callable[..., Any], table: torch.Tensor) -> None:
        self._look_up, self._table = look_up, table
        self.head: _BoundLinear | None = None

    def let_go(self) -> None:
        if self.head is not None:
            self._look_up, self._table = self.head.op.rows, self.head.prepared  # type: ignore[attr-defined]  # `lm_head` has looked

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self._look_up(ids, self._table)
        return rows


class _BoundExperts:
    """The experts of one layer with their laid out weights. first: the place of the first one held here."""

    def __init__(
        self, op: Callable[..., Any], gate_up: Parameter, down: Parameter, first: int,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:  # fmt: skip
        assert gate_up.tensor is not None
        self.op: MoeExpertsOp = op  # type: ignore[assignment]  # the table holds callables; this one also prepares
        self._weights, self._first, self._all_reduce = (gate_up, down), first, all_reduce
        self.prepared: Any = None
        here = gate_up.tensor.device
        self.counts = torch.zeros(len(gate_up.tensor), dtype=torch.int64, device=here)
        self.physical_of = torch.arange(gate_up.shape[0], device=here)

    def prepare(self) -> None:
        gate_up, down = (weight.tensor for weight in self._weights)
        assert gate_up is not None and down is not None
        self.prepared = self.op.prepare(gate_up, down)
        for weight in self._weights:
            weight.tensor = None

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        places = self.physical_of.index_select(0, ids.flatten()).view(ids.shape)
        if self._all_reduce is None:
            return self.op(x, places, weights, self.counts, self.prepared)
        places = places - self._first
        is_here = (places >= 0) & (places < len(self.counts))
        return self._all_reduce(self.op(x, torch.where(is_here, places, -1), weights, self.counts, self.prepared))


class _BoundAttention:
    """One layer's way to its cache. `segments` is bound once the cache exists."""

    segments: KVSegments

    def __init__(
        self, group: str, kernel: AttentionKernel, kv_write: Callable[..., Any], rope_kv_write: Callable[..., Any]
    ) -> None:
        self._group, self._kernel, self._kv_write, self._rope_kv_write = group, kernel, kv_write, rope_kv_write

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: ForwardContext,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        caches, slots = self.segments.own, ctx.kv_slots[self._group]
        if rope is None:
            self._kv_write((k, v), caches, slots)
        else:
            q = self._rope_kv_write(q, k, v, *rope, caches, slots)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        self._kernel.run(q, self.segments, ctx.plans[self._group], out)
        return out.flatten(1)
