"""What config.json would say, from a GGUF file's metadata. A key that changes the model and is not understood is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xllm_core.runtime.formats.gguf_header import GGUFHeader

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_PLAIN = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
# Beneath `attention.` and `rope.`, whatever is not listed here is refused: it would change the result unseen.
_UNDERSTOOD = {
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "attention.causal", "rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}  # fmt: skip


def config_from_header(header: GGUFHeader) -> dict[str, Any]:
    """A configuration under transformers' names. Raises ModelFormatError for what our families would get wrong."""
    metadata = header.metadata
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise header.error(f"holds a model of architecture {name!r}; GGUF files of {', '.join(ARCHITECTURES)} are read")
    if (num_parts := header.get("split.count", int, 1)) > 1:
        raise header.error(f"is one of {num_parts} parts; join them with llama.cpp's gguf-split --merge")
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    _refuse_unknown(header, name, own)
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[name]], "model_type": name, "_source": str(header.path)}
    for field, key in _PLAIN.items():
        if key not in own:
            raise header.error(f"lacks the metadata {name}.{key}; convert the model again")
        config[field] = own[key]
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise header.error("lacks the tensor token_embd.weight with two dimensions; convert the model again")
    config["vocab_size"] = embedding.shape[0]
    config["num_key_value_heads"] = _one_count(
        header, own.get("attention.head_count_kv", config["num_attention_heads"])
    )
    config["head_dim"] = _head_dim(header, name, config)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["attention_bias"] = name != "qwen2" and "blk.0.attn_q.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    config["rope_parameters"] = _rope(header, name, own)
    stored = {tensor.kind.name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    config["dtype"] = (
        {"BF16": "bfloat16", "F16": "float16"}.get(stored.pop(), "float32") if len(stored) == 1 else "float32"
    )
    return config


def _refuse_unknown(header: GGUFHeader, name: str, own: Mapping[str, Any]) -> None:
    if own.get("expert_count", 0):
        raise header.error(
            f"{name}.expert_count is {own['expert_count']}: mixtures of experts are not served from GGUF"
        )
    for key in own:
        if key.startswith(("attention.", "rope.")) and key not in _UNDERSTOOD:
            raise header.error(f"metadata {name}.{key} = {own[key]!r} changes the model in a way that is not served")
    if own.get("attention.causal", True) is not True:
        raise header.error(f"{name}.attention.causal is false: an encoder, which is not served")


def _one_count(header: GGUFHeader, value: Any) -> Any:
    """Some files give one count per layer; ours must be equal."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise header.error(
                f"attention.head_count_kv differs between layers ({sorted(set(value))}), which is not served"
            )
        return value[0]
    return value


def _head_dim(header: GGUFHeader, name: str, config: Mapping[str, Any]) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if not isinstance(heads, int) or heads < 1 or not isinstance(hidden, int):
        raise header.error(
            f"attention.head_count is {heads!r} for embedding_length {hidden!r}; convert the model again"
        )
    size = header.get(f"{name}.attention.key_length", int, hidden // heads)
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        if (other := header.get(key, int, size)) != size:
            raise header.error(f"{key} is {other}, the heads are {size} wide; unequal sizes are not served")
    return size


def _rope(header: GGUFHeader, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Frequencies: base, a scaling by name, and explicit factors per pair where the file has the tensor `rope_freqs.weight`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": header.get(f"{name}.rope.freq_base", float, 10000.0)}
    old_factor = header.get(f"{name}.rope.scale_linear", float, 1.0)
    factor = header.get(f"{name}.rope.scaling.factor", float, old_factor)
    kind = own.get("rope.scaling.type", "none" if factor == 1.0 else "linear")
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        names = {
            "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        rope |= {field: own[f"rope.scaling.{key}"] for field, key in names.items() if f"rope.scaling.{key}" in own}
        if (attn_factor := header.get(f"{name}.rope.scaling.attn_factor", float, 1.0)) != 1.0:
            # The file's number multiplies YaRN's own correction, a configuration's replaces it.
            rope["attention_factor"] = attn_factor * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    elif kind not in ("none", "linear"):
        raise header.error(f"rope.scaling.type is {kind!r}; none, linear and yarn are served")
    if any(tensor.startswith("rope_factors") for tensor in header.tensors):
        raise header.error(
            "holds long and short rope factors, which depend on the length of the moment and are not served"
        )
    if "rope_freqs.weight" in header.tensors:
        rope = _with_factors(header, rope)
    return rope


def _with_factors(header: GGUFHeader, rope: dict[str, Any]) -> dict[str, Any]:
    tensor = header.tensors["rope_freqs.weight"]
    if tensor.kind.name != "F32" or rope["rope_type"] == "yarn":
        raise header.error(
            f"holds rope_freqs.weight as {tensor.kind.name} beside {rope['rope_type']} scaling; only F32 without yarn is served"
        )
    raw = header.data[tensor.offset : tensor.offset + tensor.num_bytes]
    factors = [factor * rope.get("factor", 1.0) for factor in memoryview(raw).cast("f")]
    return {"rope_type": "factors", "rope_theta": rope["rope_theta"], "factors": factors}
