"""A model family: one file that turns a configuration into embed, layers and head, driven by the runner.

Models never call torch's `linear`, attention or norms: everything comes from `Parts`, so that devices, formats and ranks can differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from xllm_core.plugins.contracts.kv import KVGroupSpec
from xllm_core.plugins.contracts.ops import CORE_OPS
from xllm_core.plugins.contracts.weights import Axis, WeightMap

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the core must know of a model before it is built.

    num_layers: entries of `layers`. max_model_len: the longest context the model was made for, in tokens.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    dtype: str


@dataclass(slots=True)
class ForwardContext:
    """One step as layers see it; built by the runner, read only.

    positions: [T] int64. kv_slots: per group name, [T] int64 slot of each token. plans: per group name, the kernel's plan.
    memo: empty when a step begins (a new context per step, or cleared); the first layer keeps there what all of them share, e.g. rope's cos and sin.
    wanted: [S] int64, ascending, in the last layer's context alone: rows that are read of what it returns. It may return just these,
    [S, hidden], and spare itself the rest of a prompt once keys and values are stored; `keep` says where. None: all rows.
    """

    positions: torch.Tensor
    kv_slots: Mapping[str, torch.Tensor]
    plans: Mapping[str, Any]
    memo: dict[str, Any] = field(default_factory=dict)
    wanted: torch.Tensor | None = None

    def keep(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [S, ...]: the wanted rows, or all of them."""
        return rows if self.wanted is None else rows[self.wanted]


class Linear(Protocol):
    """A weight with its op. Shapes are this rank's share."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]; for axis "row", summed over ranks."""


class Attention(Protocol):
    """Storing new KV and attending, for one layer."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ctx: ForwardContext,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """q [T, H, D], k and v [T, G, D]. Returns [T, H * D].

        rope: cos and sin, [T, R], by which q and k are still to be rotated (op `rope`, or a fusion of it with storing); None: they are.
        """


class Parts(Protocol):
    """Where a model gets everything that is not its own arithmetic. Sizes given are full; what comes back is this rank's share."""

    world_size: int
    rank: int
    dtype: torch.dtype
    torch_device: str

    def share(self, size: int) -> int:
        """This rank's part of a dimension that is divided; raises ConfigError when it does not divide evenly."""

    def op(self, name: str, *, unfused: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """A bound op (`contracts.ops`). Called at construction only. unfused: what to take where no such fusion was chosen."""

    def parameter(
        self, name: str, shape: Sequence[int], axis: Axis = "replicated", *, is_float32: bool = False
    ) -> torch.Tensor:
        """A named parameter the loader fills (norm weights, small tables). `shape` is full; the tensor is this rank's share.

        is_float32: it stays so whatever the model's dtype.
        """

    def linear(self, name: str, in_features: int, out_features: int, *, axis: Axis, has_bias: bool = False) -> Linear:
        """A linear map with parameters `name.weight` [out, in] and, if asked, `name.bias` [out]. axis "column" divides out, "row" divides in."""

    def linear_silu_mul(self, name: str, in_features: int, inner: int, *, has_bias: bool = False) -> Linear:
        """silu(gate(x)) * up(x), column-parallel: parameter `name.weight` holds gate above up, [2 * inner, in]. Returns [T, inner's share]."""

    def router(self, name: str, hidden: int, num_experts: int) -> Linear:
        """[T, hidden] -> scores [T, num_experts] float32, on every rank (op `linear_float32`).

        `name.weight` [num_experts, hidden] stays float32 whatever the model's dtype.
        """

    def experts(self, name: str, num_experts: int, hidden: int, inner: int) -> Experts:
        """Gated experts, divided over ranks (op `moe_experts`): parameters `name.gate_up` [E, 2 * inner, hidden] and `name.down` [E, hidden, inner].

        Both have axis "expert"; the weight map fills them expert by expert (`WeightEntry.expert`).
        """

    def embedding(self, name: str, num_embeddings: int, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A table `name.weight`, divided over the vocabulary, summed over ranks."""

    def lm_head(self, name: str, size: int, vocab_size: int, *, tied_to: str | None = None) -> Linear:
        """The output projection, divided over the vocabulary, gathered over ranks. tied_to: the embedding whose weight it shares."""

    def attention(
        self,
        group: str,
        layer: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> Attention:
        """The attention of one layer in one KV group."""


class Experts(Protocol):
    """The routed experts of one layer, as many as this rank holds.

    counts: [experts held here] int64 on the device, tokens that each has got since the start, a few of padding among them where
    steps are replayed from graphs: each is recorded with as many tokens as it holds. Read it between steps, never write it.
    physical_of: [num_experts] int64, the place of each expert among those of all ranks; the identity until experts are moved.
    """

    counts: torch.Tensor
    physical_of: torch.Tensor

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x: [T, hidden]; ids: [T, K] int64, experts as the router numbers them; weights: [T, K] float32. Returns [T, hidden], summed over ranks."""


class Layer(Protocol):
    """One layer; boundaries are where KV is moved, runs are interrupted, and graphs are cut."""

    def __call__(self, h: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """h: [T, hidden]; returns the same shape."""


class Model(Protocol):
    """A built model: three stages and nothing that knows about requests."""

    layers: Sequence[Layer]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [T] int64. Returns [T, hidden]."""

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """h: [N, hidden], the rows whose logits are wanted, after the last layer. Returns [N, vocab] float32."""


class ModelFamily(Protocol):
    """What a `ModelSpec` points at. All methods but `build` work without torch; a fallback may ask the library that it falls back on."""

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """Read a configuration; raises ModelError that names the field for what this family cannot serve. Unknown variants are refused."""

    def kv_groups(self, config: Mapping[str, Any], kv_dtype: str) -> Sequence[KVGroupSpec]:
        """The cache this configuration needs (full, unsliced head counts)."""

    def attention(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Per KV group name: num_heads, num_kv_heads, head_size, scale, sliding_window, soft_cap; kernels are chosen from it."""

    def weight_map(self, config: Mapping[str, Any]) -> WeightMap:
        """Every tensor of the checkpoint, by transformers' names."""

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        """Build the model; every parameter is asked of `parts`, and filled before the first forward."""


@runtime_checkable
class AsksForOps(Protocol):
    """A `ModelFamily` whose models need ops beyond `CORE_OPS`. Assembly chooses them too, or says why no device part serves."""

    def ops(self, config: Mapping[str, Any]) -> Sequence[str]:
        """Names of `contracts.ops.MODEL_OPS`, or ops that the family's own plugin brings, that `build` will ask `Parts` for. Without torch."""


def ops_of(family: ModelFamily, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Every op that a plan for this family and configuration holds, fusions aside."""
    return (*CORE_OPS, *(family.ops(config) if isinstance(family, AsksForOps) else ()))
