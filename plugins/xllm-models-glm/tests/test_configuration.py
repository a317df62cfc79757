"""Configurations: what cannot be served is refused by the name of the field; what is missing has transformers' meaning. And the weight map."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from transformers import Glm4Config, Glm4MoeConfig, GlmConfig
from xllm_models_glm.families import Glm, Glm4, Glm4Moe
from xllm_models_glm.weights import half_split

from xllm_core.errors import ModelError

COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "_source": "/m/config.json",
}  # fmt: skip
DENSE = {**COMMON, "architectures": ["Glm4ForCausalLM"]}
MOE = {
    **COMMON, "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip

REFUSED_EVERYWHERE: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["LlamaForCausalLM"]}, "architectures"), ({"architectures": None}, "architectures"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"hidden_size": None}, "hidden_size"), ({"hidden_size": "32"}, "hidden_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"attention_bias": "yes"}, "attention_bias"), ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"), ({"head_dim": 6}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling"), ({"rms_norm_eps": 0}, "rms_norm_eps"), ({"torch_dtype": "int8"}, "dtype"),
]  # fmt: skip
REFUSED_MOE: list[tuple[dict[str, Any], str]] = [
    ({"n_routed_experts": None}, "n_routed_experts"), ({"n_group": 3}, "n_group"), ({"n_group": 8, "topk_group": 8}, "n_group"),
    ({"topk_group": 3}, "topk_group"), ({"num_experts_per_tok": 5}, "num_experts_per_tok"), ({"n_shared_experts": 0}, "n_shared_experts"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size"), ({"first_k_dense_replace": 4}, "first_k_dense_replace"),
    ({"routed_scaling_factor": -1.0}, "routed_scaling_factor"), ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ({"scoring_func": "softmax"}, "scoring_func"), ({"topk_method": "greedy"}, "topk_method"), ({"use_qk_norm": "no"}, "use_qk_norm"),
]  # fmt: skip
REFUSED = [
    *((Glm4, DENSE, *case) for case in REFUSED_EVERYWHERE), *((Glm4Moe, MOE, *case) for case in (*REFUSED_EVERYWHERE, *REFUSED_MOE)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "good", "changes", "field"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_not_served_is_refused_by_field(
    family: type, good: dict[str, Any], changes: dict[str, Any], field: str
) -> None:
    """Killed by: serving it as if the field were not there, or was another."""
    family().shape(good)
    with pytest.raises(ModelError, match=f"/m/config.json: '{field}'"):
        family().shape({**good, **changes})


@pytest.mark.parametrize(
    ("family", "theirs"), [(Glm, GlmConfig), (Glm4, Glm4Config), (Glm4Moe, Glm4MoeConfig)], ids=["glm", "glm4", "moe"]
)
def test_a_missing_field_means_what_transformers_says(family: type, theirs: type) -> None:
    """Only sizes are given. Killed by: another default."""
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    moe_sizes = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size") if family is Glm4Moe else ()
    whole = theirs(num_attention_heads=32)  # GLM-4.5's default of 96 divides no default size
    given = {name: getattr(whole, name) for name in (*sizes, *moe_sizes)} | {
        "architectures": [f"{family.__name__}ForCausalLM"]
    }
    c = family().read(given)
    head_size = getattr(whole, "head_dim", None) or whole.hidden_size // whole.num_attention_heads
    assert (c.head_size, c.num_kv_heads, c.norm_eps) == (head_size, whole.num_key_value_heads, whole.rms_norm_eps)
    assert (c.has_qkv_bias, c.is_tied) == (whole.attention_bias, whole.tie_word_embeddings)
    rope = whole.rope_parameters
    assert (c.rope.theta, c.rope.size) == (rope["rope_theta"], int(head_size * rope["partial_rotary_factor"]))
    if family is Glm4Moe:
        assert (c.has_qk_norm, c.num_mtp_layers) == (whole.use_qk_norm, whole.num_nextn_predict_layers)
        assert (c.moe.first_layer, c.moe.num_groups, c.moe.top_groups) == (
            whole.first_k_dense_replace,
            whole.n_group,
            whole.topk_group,
        )
        assert (c.moe.is_normalised, c.moe.scaling) == (whole.norm_topk_prob, whole.routed_scaling_factor)
        assert c.moe.shared_inner == whole.n_shared_experts * whole.moe_intermediate_size


def test_axes() -> None:
    """What ranks share out, and how. Killed by: a tensor declared whole, or cut along another axis."""
    divided = {
        "embed_tokens": "vocab",
        "lm_head": "vocab",
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "o_proj": "row",
    }
    for family, config in ((Glm4, DENSE), (Glm4Moe, {**MOE, "attention_bias": True})):
        for entry in family().weight_map(config).entries:
            owner = entry.name.split(".")[-2]
            expected = divided.get(owner, "replicated")
            if ".mlp." in entry.name and ".gate." not in entry.name:
                expected = "row" if owner == "down_proj" else "column"
            if ".experts." in entry.name:
                expected = "expert"
            assert entry.axis == expected, entry


def test_layers_that_only_draft_are_ignored() -> None:
    """As many as the configuration names, right after the last. Killed by: ignoring every further layer, or none."""
    patterns = Glm4Moe().weight_map({**MOE, "num_nextn_predict_layers": 2}).ignorable

    def is_ignored(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    assert is_ignored("model.layers.3.eh_proj.weight") and is_ignored("model.layers.4.mlp.experts.0.up_proj.weight")
    assert not is_ignored("model.layers.5.eh_proj.weight") and not is_ignored("model.layers.30.eh_proj.weight")
    assert not any(
        "layers" in pattern for pattern in Glm4Moe().weight_map({**MOE, "num_nextn_predict_layers": 0}).ignorable
    )


def test_neighbours_become_halves() -> None:
    """Of the rotated part; the rest stays."""
    assert half_split(8, 6) == (0, 2, 4, 1, 3, 5, 6, 7)


def test_shapes_need_no_torch() -> None:
    """In a process of its own. Killed by: an import of torch at the top."""
    code = f"import sys; from xllm_models_glm.families import Glm4Moe; Glm4Moe().weight_map({MOE!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "False", done.stderr
