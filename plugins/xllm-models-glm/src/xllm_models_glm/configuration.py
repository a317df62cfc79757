"""Reading a GLM's config.json: every field checked, every variant that is not served refused by name. No torch.

Field names and defaults are those of transformers' GlmConfig, Glm4Config and Glm4MoeConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xllm_core.plugins import Fields, KVGroupSpec, KVTensorSpec, ModelShape, RopeConfig, read_dtype, read_rope

GROUP = "full"
_ROTATED_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Experts of every layer from `first_layer` on, and the router that chooses among them.

    inner, shared_inner: width of an expert, and of the shared one. The best `top_groups` of `num_groups` groups are searched for `top_k` experts.
    """

    first_layer: int
    num_experts: int
    inner: int
    shared_inner: int
    top_k: int
    num_groups: int
    top_groups: int
    is_normalised: bool
    scaling: float


@dataclass(frozen=True, slots=True)
class GlmConfig:
    """A GLM, checked.

    rotates_neighbours: the checkpoint's rotary pairs are (0, 1), (2, 3), ... and not half-split. has_post_norms: a norm after attention and
    MLP too. has_stacked_mlp: gate and up are one tensor. num_mtp_layers: layers after the last that only draft; they are not read.
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
    has_qkv_bias: bool
    is_tied: bool
    dtype: str
    rotates_neighbours: bool = False
    has_post_norms: bool = False
    has_stacked_mlp: bool = False
    has_qk_norm: bool = False
    moe: MoeConfig | None = None
    num_mtp_layers: int = 0

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts; the leading ones have a plain MLP."""
        return self.moe is not None and layer >= self.moe.first_layer

    def shape(self) -> ModelShape:
        """The facts for the core."""
        return ModelShape(
            self.architecture, self.num_layers, self.hidden_size, self.vocab_size, self.max_model_len, self.dtype
        )

    def kv_groups(self, kv_dtype: str) -> tuple[KVGroupSpec, ...]:
        """Every layer sees everything: one group."""
        tensors = tuple(KVTensorSpec(name, (self.num_kv_heads, self.head_size), kv_dtype) for name in ("k", "v"))
        return (KVGroupSpec(GROUP, "full", tuple(range(self.num_layers)), tensors),)

    def geometry(self) -> dict[str, Any]:
        """Attention of a layer, full head counts."""
        return {
            "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_size": self.head_size,
            "scale": self.head_size**-0.5, "sliding_window": None, "soft_cap": None,
        }  # fmt: skip


def read_glm(config: Mapping[str, Any], architecture: str, *, has_post_norms: bool) -> GlmConfig:
    """GlmForCausalLM and Glm4ForCausalLM. A missing head_dim is 128, whatever the hidden size."""
    fields = Fields(config)
    common = _read_common(
        fields, architecture, head_size=fields.integer("head_dim", 128), num_kv_heads=2, norm_eps=1.5625e-07, has_bias=True
    )  # fmt: skip
    return GlmConfig(**common, rotates_neighbours=True, has_post_norms=has_post_norms, has_stacked_mlp=True)


def read_glm_moe(config: Mapping[str, Any]) -> GlmConfig:
    """Glm4MoeForCausalLM."""
    fields = Fields(config)
    heads = fields.integer("num_attention_heads")
    head_size = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    common = _read_common(
        fields, "Glm4MoeForCausalLM", head_size=head_size, num_kv_heads=8, norm_eps=1e-5, has_bias=False
    )
    return GlmConfig(
        **common,
        has_qk_norm=fields.flag("use_qk_norm", False),
        moe=_read_moe(fields, common["num_layers"]),
        num_mtp_layers=fields.integer("num_nextn_predict_layers", 1, minimum=0, maximum=1000),
    )


def _read_common(
    fields: Fields, architecture: str, *, head_size: int, num_kv_heads: int, norm_eps: float, has_bias: bool
) -> dict[str, Any]:
    """What all three share; the keywords are the defaults of the family."""
    named = fields.get("architectures")
    if not isinstance(named, list) or architecture not in named:
        raise fields.error("architectures", f"is {named!r}, this family serves {architecture!r}")
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "is set: take the weights in float32 or bfloat16")
    fields.only("hidden_act", ("silu",))
    heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads", num_kv_heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"is {kv_heads}, which does not divide {heads} attention heads")
    max_model_len = fields.integer("max_position_embeddings")
    return {
        "architecture": architecture,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": fields.num_layers(),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_size": head_size,
        "max_model_len": max_model_len,
        "norm_eps": fields.number("rms_norm_eps", norm_eps),
        "rope": read_rope(fields, head_size, max_model_len, rotated_share=_ROTATED_SHARE),
        "has_qkv_bias": fields.flag("attention_bias", has_bias),
        "is_tied": fields.flag("tie_word_embeddings", False),
        "dtype": read_dtype(fields),
    }


def _read_moe(fields: Fields, num_layers: int) -> MoeConfig:
    # Neighbouring families score by softmax or pick otherwise; a configuration that says so is not this one.
    fields.only("scoring_func", ("sigmoid",))
    fields.only("topk_method", ("noaux_tc",))
    experts, top_k = fields.integer("n_routed_experts"), fields.integer("num_experts_per_tok")
    groups, top_groups = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    if experts % groups or experts // groups < 2:
        raise fields.error(
            "n_group", f"is {groups}: {experts} experts do not make that many equal groups of two or more"
        )
    if top_groups > groups:
        raise fields.error("topk_group", f"is {top_groups}, of {groups} groups")
    if top_k > (reach := experts // groups * top_groups):
        raise fields.error(
            "num_experts_per_tok", f"is {top_k}: only {reach} experts are in the groups that are searched"
        )
    inner = fields.integer("moe_intermediate_size")
    return MoeConfig(
        first_layer=fields.integer("first_k_dense_replace", 1, minimum=0, maximum=num_layers),
        num_experts=experts,
        inner=inner,
        shared_inner=inner * fields.integer("n_shared_experts", 1),
        top_k=top_k,
        num_groups=groups,
        top_groups=top_groups,
        is_normalised=fields.flag("norm_topk_prob", True),
        scaling=fields.number("routed_scaling_factor", 1.0),
    )
