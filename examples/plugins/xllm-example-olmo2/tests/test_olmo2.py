"""The family against transformers' OLMo-2 on random weights, in real engines."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Olmo2Config, Olmo2ForCausalLM
from xllm_example_olmo2.olmo2 import Olmo2

from xllm_core import LLM, SamplingParams
from xllm_core.errors import ModelError

VOCAB = 20  # as many as an engine reports log probabilities of, so that the whole distribution is compared
FALLBACK = {"use": {"model": "core/transformers"}}
PROMPTS = [[3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6], [4, 3, 3, 8, 3, 2, 7, 9, 5, 4], [17]]

FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-3,
    "rope_theta": 1000.0,
}  # fmt: skip


def write_model(path: Path, **changes: Any) -> Olmo2ForCausalLM:
    """A random model; its norms are random too, as norms of one would hide a missing one."""
    torch.manual_seed(0)
    config = Olmo2Config(**{**FIELDS, **changes})
    model = Olmo2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["Olmo2ForCausalLM"]}))
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Olmo2ForCausalLM]:
    """(directory, oracle)."""
    path = tmp_path_factory.mktemp("olmo2")
    return str(path), write_model(path)


def generate(path: str, **settings: Any) -> list[Any]:
    """Answers to PROMPTS, with the log probability of every token at every position."""
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=VOCAB, prompt_logprobs=VOCAB)
    with LLM(path, dtype="float32", num_blocks=64, block_size=4, **settings) as llm:
        return llm.generate(PROMPTS, params)


def check(answers: list[Any], oracle: Olmo2ForCausalLM) -> None:
    """Every log probability within 1e-4 of transformers', at prompt positions and at each decode step."""
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = answer.outputs[0].token_ids
        with torch.no_grad():
            expected = oracle(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
        reported = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
        assert len(reported) == len(prompt) + len(tokens) - 1
        for row, entries in zip(expected, reported, strict=False):
            assert len(entries) == VOCAB
            assert all(
                math.isclose(entries[token].logprob, float(row[token]), abs_tol=1e-4, rel_tol=0)
                for token in range(VOCAB)
            )


@pytest.mark.parametrize(
    "settings", [{}, {"max_chunk_tokens": 5}, {"max_num_seqs": 1}], ids=["batched", "in chunks of 5", "alone"]
)
def test_logits(model: tuple[str, Olmo2ForCausalLM], settings: dict[str, Any]) -> None:
    """Whole prompts and chunks, side by side and one at a time, then ten decode steps over paged KV. Killed by: a norm before instead of
    after, per head instead of over all of them, another eps or theta, scores scaled otherwise.
    """
    check(generate(model[0], **settings), model[1])


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}], ids=str
)
def test_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Shared tables, no sharing of KV heads, one for all. Killed by: a head count taken from the wrong field."""
    check_against = write_model(tmp_path, **changes)
    check(generate(str(tmp_path)), check_against)


def test_the_fallback_says_the_same(model: tuple[str, Olmo2ForCausalLM]) -> None:
    """transformers' own layers on the same engine choose the same tokens."""
    ours, theirs = generate(model[0]), generate(model[0], **FALLBACK)
    assert [answer.outputs[0].token_ids for answer in ours] == [answer.outputs[0].token_ids for answer in theirs]


def test_it_comes_before_the_fallback(model: tuple[str, Olmo2ForCausalLM]) -> None:
    """Installed, it serves what the fallback served before. Killed by: a spec that does not name the architecture."""
    command = [sys.executable, "-m", "xllm_core.cli", "plugins", "why", "model", "--model", model[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "chosen   example-olmo2/olmo2" in done.stdout, done.stdout + done.stderr
    assert "rejected core/transformers  not asked: example-olmo2/olmo2 comes first and answers" in done.stdout


def test_axes() -> None:
    """What ranks share out: heads of the values and of the output, the MLP, the vocabulary. Queries and keys stay whole, for their norms."""
    entries = Olmo2().weight_map({**FIELDS, "num_hidden_layers": 1}).entries
    axes = {entry.name.removeprefix("model.layers.0.").removesuffix(".weight"): entry.axis for entry in entries}
    divided = {
        "model.embed_tokens": "vocab", "lm_head": "vocab", "self_attn.v_proj": "column", "self_attn.o_proj": "row",
        "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row",
    }  # fmt: skip
    assert {name: axis for name, axis in axes.items() if axis != "replicated"} == divided


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"), ({"attention_bias": True}, "attention_bias"), ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads"), ({"rope_scaling": {"rope_type": "yarn"}}, "rope_parameters"),
    ],
)  # fmt: skip
def test_what_it_does_not_serve_is_refused_by_field(changes: dict[str, Any], word: str) -> None:
    """Killed by: serving it as if the field were not there."""
    with pytest.raises(ModelError, match=f"/m/config.json: '{word}'"):
        Olmo2().shape({**FIELDS, **changes, "_source": "/m/config.json"})


def test_shapes_need_no_torch() -> None:
    """In a process of its own. Killed by: an import of torch at the top."""
    code = f"import sys; from xllm_example_olmo2.olmo2 import Olmo2; Olmo2().weight_map({FIELDS!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "False", done.stderr
