"""OLMo-2: a decoder whose norms stand after attention and MLP, and over all heads of the queries and of the keys. A `ModelFamily`.

Source: arXiv:2501.00656. Field names and defaults are those of transformers' Olmo2Config. torch is imported by what `build` calls, and by
nothing else here: a family is asked for its shapes in processes that have no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xllm_core.errors import ModelFormatError
from xllm_core.plugins import (
    Axis,
    ForwardContext,
    KVGroupSpec,
    KVTensorSpec,
    Layer,
    Model,
    ModelShape,
    Parts,
    WeightEntry,
    WeightMap,
)

if TYPE_CHECKING:
    import torch

GROUP = "full"


@dataclass(frozen=True, slots=True)
class Config:
    """The fields that matter, checked."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_model_len: int
    norm_eps: float
    rope_theta: float
    is_tied: bool
    dtype: str

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Elements of the keys, or of the values, of a token."""
        return self.num_kv_heads * self.head_size


def read(config: Mapping[str, Any]) -> Config:
    """Check a configuration; raises ModelFormatError that names file and field for what is not served here."""

    def wrong(name: str, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{config.get('_source', 'config.json')}: {name!r} {problem}")

    def integer(name: str, default: int | None = None) -> int:
        value = config.get(name) if config.get(name) is not None else default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise wrong(name, f"is {config.get(name)!r}, a positive whole number is needed")
        return value

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise wrong("rope_parameters", f"is of type {kind!r}; served is 'default'")
    for name, served in (("hidden_act", "silu"), ("attention_bias", False), ("quantization_config", None)):
        if config.get(name) not in (served, None):
            raise wrong(name, f"is {config[name]!r}; served is {served!r}")
    heads, hidden = integer("num_attention_heads"), integer("hidden_size")
    kv_heads = integer("num_key_value_heads", heads)
    if hidden % (2 * heads) or heads % kv_heads:
        raise wrong(
            "num_attention_heads",
            f"is {heads}: heads of even size must divide {hidden}, and {kv_heads} KV heads must divide them",
        )
    return Config(
        integer("vocab_size"), hidden, integer("intermediate_size"), integer("num_hidden_layers"), heads, kv_heads,
        integer("max_position_embeddings"), float(config.get("rms_norm_eps") or 1e-5),
        float(rope.get("rope_theta") or config.get("rope_theta") or 500000.0), config.get("tie_word_embeddings") is True,
        str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )  # fmt: skip


class Olmo2:
    """The family: a configuration's shapes, cache, weights, and the model built from it."""

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """The facts for the core."""
        read_config = read(config)
        return ModelShape(
            "Olmo2ForCausalLM", read_config.num_layers, read_config.hidden_size, read_config.vocab_size, read_config.max_model_len,
            read_config.dtype,
        )  # fmt: skip

    def kv_groups(self, config: Mapping[str, Any], kv_dtype: str) -> Sequence[KVGroupSpec]:
        """Every layer sees everything: one group."""
        c = read(config)
        tensors = tuple(KVTensorSpec(name, (c.num_kv_heads, c.head_size), kv_dtype) for name in ("k", "v"))
        return (KVGroupSpec(GROUP, "full", tuple(range(c.num_layers)), tensors),)

    def attention(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """What a kernel is chosen by."""
        return {GROUP: geometry(read(config))}

    def weight_map(self, config: Mapping[str, Any]) -> WeightMap:
        """transformers' names, shapes, and how each divides over ranks."""
        c = read(config)
        entries = [
            WeightEntry("model.embed_tokens.weight", "embed.weight", (c.vocab_size, c.hidden_size), "vocab"),
            WeightEntry("model.norm.weight", "norm", (c.hidden_size,), "replicated"),
        ]
        if not c.is_tied:
            entries.append(WeightEntry("lm_head.weight", "lm_head.weight", (c.vocab_size, c.hidden_size), "vocab"))
        for i in range(c.num_layers):
            for name, shape, axis in layer_weights(c):
                source, param = f"model.layers.{i}.{name}.weight", f"layers.{i}.{name}.weight"
                if name != "mlp.gate_up":
                    entries.append(WeightEntry(source, param, shape, axis))
                    continue
                half = (
                    c.intermediate_size,
                    c.hidden_size,
                )  # two tensors of the checkpoint are one map here: half as many calls
                for first, part in ((0, "gate_proj"), (c.intermediate_size, "up_proj")):
                    source = f"model.layers.{i}.mlp.{part}.weight"
                    entries.append(WeightEntry(source, param, half, axis, rows=(first, c.intermediate_size)))
        return WeightMap(entries, ignorable=[r"lm_head\.weight"] if c.is_tied else [])

    def build(self, config: Mapping[str, Any], parts: Parts) -> Model:
        """The model, its parameters asked of `parts`."""
        return Decoder(read(config), parts)


def geometry(c: Config) -> dict[str, Any]:
    """Attention of a layer; full head counts."""
    return {
        "num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads, "head_size": c.head_size, "scale": c.head_size**-0.5,
        "sliding_window": None, "soft_cap": None,
    }  # fmt: skip


def layer_weights(c: Config) -> list[tuple[str, tuple[int, ...], Axis]]:
    """(name, shape, axis) of a layer's weights.

    Queries and keys are normed over all heads together, so each rank computes all of them and goes on with its own heads.
    """
    return [
        ("self_attn.q_proj", (c.hidden_size, c.hidden_size), "replicated"),
        ("self_attn.k_proj", (c.kv_size, c.hidden_size), "replicated"),
        ("self_attn.v_proj", (c.kv_size, c.hidden_size), "column"),
        ("self_attn.o_proj", (c.hidden_size, c.hidden_size), "row"),
        ("self_attn.q_norm", (c.hidden_size,), "replicated"),
        ("self_attn.k_norm", (c.kv_size,), "replicated"),
        ("post_attention_layernorm", (c.hidden_size,), "replicated"),
        ("mlp.gate_up", (2 * c.intermediate_size, c.hidden_size), "column"),
        ("mlp.down_proj", (c.hidden_size, c.intermediate_size), "row"),
        ("post_feedforward_layernorm", (c.hidden_size,), "replicated"),
    ]


class Rotary:
    """cos and sin of a step's positions, made by the first layer that asks and shared by `ForwardContext.memo`."""

    def __init__(self, c: Config, parts: Parts) -> None:
        import torch

        exponents = torch.arange(0, c.head_size, 2, dtype=torch.int64, device=parts.torch_device).float() / c.head_size
        self._frequencies, self._dtype = 1.0 / (c.rope_theta**exponents), parts.dtype

    def __call__(self, ctx: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Each [T, head_size], the half repeated."""
        if "rotary" not in ctx.memo:
            angles = (ctx.positions.float().unsqueeze(1) * self._frequencies).repeat(1, 2)
            ctx.memo["rotary"] = (angles.cos().to(self._dtype), angles.sin().to(self._dtype))
        cos, sin = ctx.memo["rotary"]
        return cos, sin


class DecoderLayer:
    """h + norm(attention(h)), then h + norm(mlp(h))."""

    def __init__(self, c: Config, parts: Parts, index: int, rotary: Rotary) -> None:
        self._linear, self._weight = {}, {}
        for name, shape, axis in layer_weights(c):
            short, full = name.rpartition(".")[2], f"layers.{index}.{name}"
            if len(shape) == 2:
                self._linear[short] = parts.linear(full, shape[1], shape[0], axis=axis)
            else:
                self._weight[short] = parts.parameter(f"{full}.weight", shape, axis)
        self._norm, self._eps, self._silu_mul, self._rope = (
            parts.op("rms_norm"),
            c.norm_eps,
            parts.op("silu_mul"),
            parts.op("rope"),
        )
        self._head_size, self._rotary = c.head_size, rotary
        self._num_heads, self._num_kv_heads, self._rank = (
            parts.share(c.num_heads),
            parts.share(c.num_kv_heads),
            parts.rank,
        )
        self._attend = parts.attention(GROUP, index, **geometry(c))

    def __call__(self, h: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """h: [T, hidden]; returns the same shape."""
        h = h + self._normed(self._attention(h, ctx), "post_attention_layernorm")
        return h + self._normed(self._mlp(h), "post_feedforward_layernorm")

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        out: torch.Tensor = self._norm(x, self._weight[name], self._eps)
        return out

    def _attention(self, h: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        q = self._my_heads(self._normed(self._linear["q_proj"](h), "q_norm"), self._num_heads)
        k = self._my_heads(self._normed(self._linear["k_proj"](h), "k_norm"), self._num_kv_heads)
        v = self._linear["v_proj"](h).view(len(h), self._num_kv_heads, self._head_size)
        q, k = self._rope(q, k, *self._rotary(ctx))
        return self._linear["o_proj"](self._attend(q, k, v, ctx))

    def _my_heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """[T, all heads] -> [T, this rank's heads, head_size]."""
        return x.view(len(x), -1, self._head_size).narrow(1, self._rank * count, count)

    def _mlp(self, h: torch.Tensor) -> torch.Tensor:
        return self._linear["down_proj"](self._silu_mul(self._linear["gate_up"](h)))


class Decoder:
    """The model: embed, layers, head."""

    layers: Sequence[Layer]

    def __init__(self, c: Config, parts: Parts) -> None:
        rotary = Rotary(c, parts)
        self._embed = parts.embedding("embed", c.vocab_size, c.hidden_size)
        self.layers = [DecoderLayer(c, parts, index, rotary) for index in range(c.num_layers)]
        self._weight, self._norm, self._eps = (
            parts.parameter("norm", (c.hidden_size,)),
            parts.op("rms_norm"),
            c.norm_eps,
        )
        self._head = parts.lm_head("lm_head", c.hidden_size, c.vocab_size, tied_to="embed" if c.is_tied else None)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [T] int64. Returns [T, hidden]."""
        return self._embed(token_ids)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """h: [N, hidden]. Returns [N, vocab] float32."""
        return self._head(self._norm(h, self._weight, self._eps)).float()
