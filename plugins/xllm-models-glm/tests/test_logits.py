"""Logits against transformers' classes on random weights, driven by hand: whole prompts, chunks, decode steps, and all of them in one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from xllm_models_glm.families import Glm, Glm4, Glm4Moe

from xllm_core.runtime.formats.safetensors_dir import SafetensorsDirectory
from xllm_core.testing.model_harness import Harness, run_ranks
from xllm_core.testing.tiny import load_oracle

FAMILIES = {"glm": Glm, "glm4": Glm4, "moe": Glm4Moe}
LENGTH, PREFILL = 41, 29
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.5,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("glm", {}),
    "glm, no bias": ("glm", {"attention_bias": False}),
    "glm, tied, a quarter turns": ("glm", {"tie_word_embeddings": True, "partial_rotary_factor": 0.25}),
    "glm, all of a head turns": ("glm", {"partial_rotary_factor": 1.0, "num_key_value_heads": 4}),
    "glm4": ("glm4", {}),
    "glm4, one KV head, bias off": ("glm4", {"num_key_value_heads": 1, "attention_bias": False}),
    "glm4, yarn": ("glm4", {"rope_parameters": YARN}),
    "moe": ("moe", {}),
    "moe, as GLM-4.5-Air": ("moe", {"use_qk_norm": False, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}),
    "moe, weights as scored": ("moe", {"norm_topk_prob": False, "attention_bias": False}),
    "moe, head size by division": ("moe", {"head_dim": None}),
    "moe, no dense layer, two shared": ("moe", {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    "moe, dense layers only": ("moe", {"first_k_dense_replace": 3}),
    "moe, every expert of the groups": ("moe", {"num_experts_per_tok": 4}),
    "moe, tied, all of a head turns": ("moe", {"tie_word_embeddings": True, "partial_rotary_factor": 1.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(tiny: Callable[..., Path], name: str) -> None:
    """1e-4 in float32 at every position. Killed by: pairs turned the other way, a part of the head too large or small, the wrong norm after
    attention or MLP, a bias left out, weights with the correction in them, groups scored by their best alone, another scaling.
    """
    kind, overrides = CASES[name]
    path = tiny(kind, **overrides)
    opened = SafetensorsDirectory().open(path)
    assert opened is not None
    prompts = torch.randint(0, 128, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = load_oracle(path)(prompts).logits
    harness = Harness(FAMILIES[kind](), opened)
    sizes: list[Callable[[int], int]] = [lambda at: LENGTH, lambda at: 8, lambda at: 1, lambda at: 1 if at else PREFILL]
    logits: list[list[torch.Tensor]] = [[], [], [], []]
    done, tokens = [0, 0, 0, 0], prompts.tolist()
    while min(done) < LENGTH:
        new = {row: tokens[row][at : at + sizes[row](at)] for row, at in enumerate(done) if at < LENGTH}
        for row, result in harness.step(new).items():
            logits[row].append(result)
            done[row] += len(result)
    for row, parts in enumerate(logits):
        assert (torch.cat(parts) - expected[row]).abs().max() <= 1e-4, f"row {row}"


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_ranks_equal_one(tiny: Callable[..., Path], kind: str) -> None:
    """Heads, MLPs, experts and the vocabulary cut in two, each rank on a thread. Killed by: gate and up cut as one tensor, a sum left out."""
    opened = SafetensorsDirectory().open(tiny(kind))
    assert opened is not None
    tokens = torch.randint(0, 128, (17,), generator=torch.Generator().manual_seed(11)).tolist()
    whole = Harness(FAMILIES[kind](), opened).step({0: tokens})[0]
    for logits in run_ranks(FAMILIES[kind](), opened, tokens):
        assert (logits - whole).abs().max() <= 1e-4


def test_counters(tiny: Callable[..., Path]) -> None:
    """Every layer with experts counts as many choices as transformers' router makes, expert by expert; the dense layer counts nothing."""
    path = tiny("moe")
    opened = SafetensorsDirectory().open(path)
    assert opened is not None
    harness, tokens = Harness(Glm4Moe(), opened), list(range(3, 40))
    harness.step({0: tokens[:20]})
    harness.step({0: tokens[20:]})
    chosen: list[torch.Tensor] = []
    oracle = load_oracle(path)
    for layer in oracle.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[2]))
    with torch.no_grad():
        oracle(torch.tensor([tokens]))
    counts = harness.parts.expert_counts()
    assert list(counts) == ["layers.1.experts", "layers.2.experts"]
    for found, ids in zip(counts.values(), chosen, strict=True):
        assert found.sum() == 3 * len(tokens)
        assert torch.equal(found, torch.bincount(ids.flatten(), minlength=8))
