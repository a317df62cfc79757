"""Random models of a few thousand weights, written as Hugging Face directories by transformers itself, which also is their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None, "sliding_window": None, "n_routed_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
}  # fmt: skip
"""Fields by transformers' names. Most families read these; what a family lacks it is not given."""


def tiny_config(architecture: str, **overrides: Any) -> Any:
    """A small configuration of an architecture that transformers knows ("LlamaForCausalLM"), or None if it knows it not."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = [kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]
    if not kinds:
        return None
    defaults = transformers.AutoConfig.for_model(kinds[0])
    wanted = {name: value for name, value in SMALL.items() if hasattr(defaults, name)}
    if isinstance(getattr(defaults, "head_dim", None), int):
        wanted["head_dim"] = 16
    return transformers.AutoConfig.for_model(kinds[0], **{**wanted, "architectures": [architecture], **overrides})


def write_tiny(config: Any, path: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write a random model of a transformers configuration to `path` and return it.

    Norm weights and biases are random too, also those kept as buffers: left at one and zero they would hide a missing one.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    build: Any = transformers.AutoModelForCausalLM.from_config
    model = build(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.state_dict(keep_vars=True).items():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    model.save_pretrained(path)
    return path


def load_oracle(path: Path, dtype: str = "float32") -> Any:
    """The same model in transformers, ready to call."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return model.eval()
