"""What the dense decoders (Llama, Mistral, Qwen) have in common as data: shapes, KV groups, weight maps. No torch.

Each family's file says how its configuration becomes a `DenseConfig`; `models.layers` builds the model from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_core.models.config import Fields, RopeConfig, read_dtype, read_rope, shown
from xllm_core.plugins.contracts.kv import KVGroupSpec, KVTensorSpec
from xllm_core.plugins.contracts.model import Model, ModelShape, Parts
from xllm_core.plugins.contracts.weights import Axis, WeightEntry, WeightMap


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A pre-norm decoder with grouped-query attention and a gated MLP.

    window: sliding window in tokens of the layers in `window_layers`; every other layer sees all.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_model_len: int
    norm_eps: float
    rope: RopeConfig
    is_tied: bool
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    window: int | None = None
    window_layers: frozenset[int] = frozenset()
    dtype: str = "float32"

    def group_of(self, layer: int) -> str:
        """The KV group of a layer."""
        return "window" if layer in self.window_layers else "full"

    def shape(self) -> ModelShape:
        """The facts for the core."""
        return ModelShape(
            self.architecture, self.num_layers, self.hidden_size, self.vocab_size, self.max_model_len, self.dtype
        )

    def kv_groups(self, kv_dtype: str) -> tuple[KVGroupSpec, ...]:
        """One group for the layers that see everything, one for those with a window; only those that have layers."""
        slot = (self.num_kv_heads, self.head_size)
        tensors = (KVTensorSpec("k", slot, kv_dtype), KVTensorSpec("v", slot, kv_dtype))
        full = tuple(layer for layer in range(self.num_layers) if layer not in self.window_layers)
        groups = (
            KVGroupSpec("full", "full", full, tensors),
            KVGroupSpec("window", "sliding_window", tuple(sorted(self.window_layers)), tensors, window=self.window),
        )
        return tuple(group for group in groups if group.layers)

    def attention(self) -> dict[str, dict[str, Any]]:
        """Geometry per KV group."""
        common = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "scale": self.head_size**-0.5,
            "soft_cap": None,
        }
        return {group.name: {**common, "sliding_window": group.window} for group in self.kv_groups(self.dtype)}

    def weight_map(self) -> WeightMap:
        """Names as in transformers' state dict. Queries, keys and values are one parameter here, and so are gate and up."""
        entries = [
            WeightEntry("model.embed_tokens.weight", "embed.weight", (self.vocab_size, self.hidden_size), "vocab"),
            WeightEntry("model.norm.weight", "norm", (self.hidden_size,), "replicated"),
        ]
        ignorable = [r".*\.rotary_emb\.inv_freq"]  # old checkpoints carry what is computed
        if self.is_tied:
            ignorable.append(r"lm_head\.weight")  # some tied checkpoints hold the table twice
        else:
            head = (self.vocab_size, self.hidden_size)
            entries.append(WeightEntry("lm_head.weight", "lm_head.weight", head, "vocab"))
        for layer in range(self.num_layers):
            entries += self._layer_entries(f"model.layers.{layer}", f"layers.{layer}")
        return WeightMap(entries, ignorable)

    def _layer_entries(self, source: str, target: str) -> list[WeightEntry]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
        entries = [
            WeightEntry(f"{source}.input_layernorm.weight", f"{target}.input_norm", (hidden,), "replicated"),
            WeightEntry(f"{source}.post_attention_layernorm.weight", f"{target}.mlp_norm", (hidden,), "replicated"),
        ]
        qkv = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        gate_up = {"gate_proj": inner, "up_proj": inner}
        entries += _fused(attention, qkv, f"{target}.qkv", hidden, self.has_qkv_bias)
        entries += _fused(attention, {"o_proj": hidden}, f"{target}.o", q_rows, self.has_output_bias, "row")
        entries += _fused(mlp, gate_up, f"{target}.gate_up", hidden, self.has_mlp_bias)
        entries += _fused(mlp, {"down_proj": hidden}, f"{target}.down", inner, self.has_mlp_bias, "row")
        if self.has_qk_norm:
            for name in ("q_norm", "k_norm"):
                entry = WeightEntry(f"{attention}.{name}.weight", f"{target}.{name}", (self.head_size,), "replicated")
                entries.append(entry)
        return entries


def _fused(
    source: str, sizes: Mapping[str, int], param: str, in_features: int, has_bias: bool, axis: Axis = "column"
) -> list[WeightEntry]:
    """Entries of several maps that are stacked, in order, into one parameter."""
    entries: list[WeightEntry] = []
    first = 0
    for name, size in sizes.items():
        rows = (first, size)
        entries.append(WeightEntry(f"{source}.{name}.weight", f"{param}.weight", (size, in_features), axis, rows))
        if has_bias:
            bias_axis: Axis = "replicated" if axis == "row" else axis
            entries.append(WeightEntry(f"{source}.{name}.bias", f"{param}.bias", (size,), bias_axis, rows))
        first += size
    return entries


def read_dense(config: Mapping[str, Any], architecture: str, **traits: Any) -> DenseConfig:
    """The fields that all dense decoders share; `traits` are the family's own answers (biases, windows, head size, ...)."""
    fields = Fields(config)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or architecture not in architectures:
        raise fields.error("architectures", f"is {shown(architectures)}, this family serves {architecture!r}")
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        raise fields.error(
            "quantization_config", f"says {shown(method)}: take the weights in float32 or bfloat16, or as GGUF"
        )
    fields.only("hidden_act", ("silu",))
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} attention heads"
        )
    head_size = traits.pop("head_size", None) or fields.integer("head_dim", hidden_size // num_heads)
    if head_size % 2:
        raise fields.error("head_dim", f"is {head_size}, an even number is needed to rotate pairs")
    max_model_len = fields.integer("max_position_embeddings")
    return DenseConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.num_layers(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_model_len=max_model_len,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=read_rope(fields, head_size, max_model_len),
        is_tied=fields.flag("tie_word_embeddings", traits.pop("is_tied_by_default", False)),
        dtype=read_dtype(fields),
        **traits,
    )


class DenseFamily(ABC):
    """`contracts.model.ModelFamily` for a family that is a `DenseConfig`; what differs is how it is read."""

    @abstractmethod
    def read(self, config: Mapping[str, Any]) -> DenseConfig:
        """The configuration, checked; ModelFormatError names the field that cannot be served."""

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """What the core must know."""
        return self.read(config).shape()

    def kv_groups(self, config: Mapping[str, Any], kv_dtype: str) -> Sequence[KVGroupSpec]:
        """The cache it needs."""
        return self.read(config).kv_groups(kv_dtype)

    def attention(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Geometry per KV group."""
        return self.read(config).attention()

    def weight_map(self, config: Mapping[str, Any]) -> WeightMap:
        """Every tensor and its axis."""
        return self.read(config).weight_map()

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        """The model; imports torch."""
        from xllm_core.models.layers import DenseDecoder

        return DenseDecoder(self.read(config), parts)
