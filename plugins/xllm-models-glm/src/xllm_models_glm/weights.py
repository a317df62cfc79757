"""The weight map of a GLM: transformers' names on disk, our parameters, and how each divides over ranks. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from xllm_core.plugins import Axis, WeightEntry, WeightMap
from xllm_models_glm.configuration import GlmConfig, MoeConfig


def weight_map(c: GlmConfig) -> WeightMap:
    """Every tensor. Queries, keys and values are one parameter here, and so are gate and up; experts are stacked."""
    table = (c.vocab_size, c.hidden_size)
    entries = [
        WeightEntry("model.embed_tokens.weight", "embed.weight", table, "vocab"),
        WeightEntry("model.norm.weight", "norm", (c.hidden_size,), "replicated"),
    ]
    if not c.is_tied:
        entries.append(WeightEntry("lm_head.weight", "lm_head.weight", table, "vocab"))
    for layer in range(c.num_layers):
        entries += _layer(c, layer)
    ignorable = [r".*\.rotary_emb\.inv_freq", *([r"lm_head\.weight"] if c.is_tied else [])]
    # Layers after the last one draft further tokens; nothing reads them yet.
    ignorable += [rf"model\.layers\.{c.num_layers + i}\..*" for i in range(c.num_mtp_layers)]
    return WeightMap(entries, ignorable)


def _layer(c: GlmConfig, layer: int) -> Iterator[WeightEntry]:
    source, target = f"model.layers.{layer}", f"layers.{layer}"
    norms = {"input_layernorm": "input_norm", "post_attention_layernorm": "mlp_norm"}
    if c.has_post_norms:
        norms |= {"post_self_attn_layernorm": "attention_post_norm", "post_mlp_layernorm": "mlp_post_norm"}
    for name, param in norms.items():
        yield WeightEntry(f"{source}.{name}.weight", f"{target}.{param}", (c.hidden_size,), "replicated")
    yield from _attention(c, f"{source}.self_attn", target)
    if c.moe is not None and c.is_moe(layer):
        yield from _moe(c, c.moe, f"{source}.mlp", target)
    else:
        yield from _mlp(c, f"{source}.mlp", f"{target}.mlp", c.intermediate_size, is_stacked=c.has_stacked_mlp)


def _attention(c: GlmConfig, source: str, target: str) -> Iterator[WeightEntry]:
    order = half_split(c.head_size, c.rope.size) if c.rotates_neighbours else None
    first = 0
    for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
        size, row_order = heads * c.head_size, order if name != "v" else None
        kinds: list[tuple[str, tuple[int, ...]]] = [("weight", (size, c.hidden_size))]
        kinds += [("bias", (size,))] if c.has_qkv_bias else []
        for kind, shape in kinds:
            yield WeightEntry(
                f"{source}.{name}_proj.{kind}", f"{target}.qkv.{kind}", shape, "column", (first, size), row_order=row_order
            )  # fmt: skip
        first += size
    rows = c.num_heads * c.head_size
    yield WeightEntry(f"{source}.o_proj.weight", f"{target}.o.weight", (c.hidden_size, rows), "row")
    for name in ("q_norm", "k_norm") if c.has_qk_norm else ():
        yield WeightEntry(f"{source}.{name}.weight", f"{target}.{name}", (c.head_size,), "replicated")


def half_split(head_size: int, rotated: int) -> tuple[int, ...]:
    """Rows of a head such that neighbours (2i, 2i + 1) become the pairs (i, i + rotated / 2) that the op `rope` turns.

    Queries and keys are reordered alike, so their products are what they were.
    """
    return (*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_size))


def _mlp(c: GlmConfig, source: str, target: str, inner: int, *, is_stacked: bool = False) -> Iterator[WeightEntry]:
    hidden, axis = c.hidden_size, _COLUMN
    if is_stacked:
        yield WeightEntry(
            f"{source}.gate_up_proj.weight", f"{target}.gate_up.weight", (2 * inner, hidden), axis, stacked=2
        )
    else:
        for first, name in ((0, "gate_proj"), (inner, "up_proj")):
            yield WeightEntry(
                f"{source}.{name}.weight", f"{target}.gate_up.weight", (inner, hidden), axis, (first, inner)
            )
    yield WeightEntry(f"{source}.down_proj.weight", f"{target}.down.weight", (hidden, inner), "row")


_COLUMN: Axis = "column"


def _moe(c: GlmConfig, moe: MoeConfig, source: str, target: str) -> Iterator[WeightEntry]:
    hidden, inner = c.hidden_size, moe.inner
    yield WeightEntry(f"{source}.gate.weight", f"{target}.router.weight", (moe.num_experts, hidden), "replicated")
    name = f"{source}.gate.e_score_correction_bias"
    yield WeightEntry(name, f"{target}.router.correction", (moe.num_experts,), "replicated")
    yield from _mlp(c, f"{source}.shared_experts", f"{target}.shared", moe.shared_inner)
    for expert in range(moe.num_experts):
        for first, name in ((0, "gate_proj"), (inner, "up_proj")):
            yield WeightEntry(
                f"{source}.experts.{expert}.{name}.weight", f"{target}.experts.gate_up", (inner, hidden), "expert", (first, inner),
                expert=expert,
            )  # fmt: skip
        name = f"{source}.experts.{expert}.down_proj.weight"
        yield WeightEntry(name, f"{target}.experts.down", (hidden, inner), "expert", expert=expert)
