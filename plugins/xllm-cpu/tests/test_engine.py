"""A model on this device: chosen by itself, answers that are the same to the bit, and those of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from xllm_cpu.isa import runnable

from xllm_core import LLM, SamplingParams
from xllm_core.testing import check_plugin
from xllm_core.testing.tiny import tiny_config, write_tiny
from xllm_core.testing.tiny_gguf import Kind, write_tiny_gguf
from xllm_core.testing.verify import QUICK, Verifier

PROMPTS = [
    {"prompt_token_ids": [(i * 7 + j * j) % 128 for j in range(length)]} for i, length in enumerate((1, 5, 33, 70))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers, grouped heads."""
    return str(write_tiny(tiny_config("LlamaForCausalLM", head_dim=16), tmp_path_factory.mktemp("tiny")))


KINDS = {"k_proj": Kind.Q4_0, "v_proj": Kind.Q8_0, "embed_tokens": Kind.Q8_0}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, tied and as one file of blocks: Q4_1, and what stands in `KINDS`."""
    folder = tmp_path_factory.mktemp("file")
    source = write_tiny(tiny_config("LlamaForCausalLM", head_dim=16, tie_word_embeddings=True), folder / "source")
    no_tokenizer = {"tokenizer.ggml.tokens": None}
    kinds = {"kind_of": lambda name: KINDS.get(name.split(".")[-2], Kind.Q4_1), "metadata": no_tokenizer}
    return str(write_tiny_gguf(source, folder / "m.gguf", **kinds))


def tokens(model: str, **settings: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(model, dtype="float32", num_blocks=128, max_num_seqs=8, **settings) as llm:
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize("isa", runnable())
def test_tokens_of_the_reference(model: str, isa: str) -> None:
    """On every instruction set, float32."""
    expected = tokens(model, device="core/reference")
    assert tokens(model, device="cpu/cpu", plugin={"cpu": {"isa": isa}}) == expected


def test_it_is_chosen_where_no_accelerator_is(model: str) -> None:
    """By rank, and its fusions are in use."""
    with LLM(model, num_blocks=64) as llm:
        info = llm.info
    assert info.device.startswith("CPU (") and runnable()[0] in info.device
    assert info.kernels["attention.full"] == "cpu/paged" and info.kernels["rope_kv_write"] == "cpu/rope_kv_write"


def scores(model: str, **settings: Any) -> torch.Tensor:
    """Log probabilities of the prompts' own tokens."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    with LLM(model, dtype="float32", num_blocks=128, max_num_seqs=8, **settings) as llm:
        for answer in llm.generate(PROMPTS, params, use_tqdm=False):
            pairs = zip(answer.prompt_token_ids[1:], (answer.prompt_logprobs or [])[1:], strict=True)
            found += [entry[token].logprob for token, entry in pairs if entry is not None]
    return torch.tensor(found)


@pytest.mark.parametrize("quantization", ["int8", "gguf"])
@pytest.mark.parametrize("isa", runnable())
def test_quantised_scores_of_the_reference(model: str, file: str, isa: str, quantization: str) -> None:
    """The same format, whoever computes it: what remains, where the last bit of a silu moves a byte by one, is far below what 8 bits cost."""
    plugin, model = {"cpu": {"isa": isa}}, file if quantization == "gguf" else model
    expected, exact = (scores(model, device="core/reference", quantization=q) for q in (quantization, None))
    found = scores(model, device="cpu/cpu", quantization=quantization, plugin=plugin)
    cost = float((expected - exact).square().mean())
    assert cost > 0 and float((found - expected).square().mean()) < cost / 4


@pytest.mark.parametrize(("quantization", "ops"), [("int8", "int8"), ("gguf", "blocks")])
def test_quantised_parts(model: str, file: str, quantization: str, ops: str) -> None:
    """The fusion and the head of the format are in use."""
    with LLM(file if ops == "blocks" else model, num_blocks=64, quantization=quantization, device="cpu/cpu") as llm:
        used = {name: part for name, part in llm.info.kernels.items() if name.endswith(ops)}
    assert used == {name: f"cpu/{name}" for name in (f"linear_{ops}", f"lm_head_{ops}", f"linear_silu_mul_{ops}")}


@pytest.mark.parametrize("quantization", [None, "int8", "gguf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_to_the_bit(model: str, file: str, dtype: str, quantization: str | None) -> None:
    """The quick matrix. The device promises equal rows, so no near tie excuses a difference. Dies with any kernel that feels its neighbours."""
    settings = {"quantization": quantization} if quantization else {}
    model = file if quantization == "gguf" else model
    report = Verifier(model, dtype=dtype, scale=QUICK, num_blocks=256, device="cpu/cpu", **settings).run()
    assert report.has_passed, [
        (row.feature, row.differences, row.activity) for row in report.rows if not row.has_passed
    ]


@pytest.mark.parametrize("isa", runnable())
def test_scores_over_a_cache_in_8_bits(model: str, isa: str) -> None:
    """The same codes, whoever computes: what remains is far below what 8 bits cost. Dies with a step of another head or position."""
    expected = scores(model, device="core/reference", kv_cache_dtype="int8")
    exact = scores(model, device="core/reference")
    found = scores(model, device="cpu/cpu", kv_cache_dtype="int8", plugin={"cpu": {"isa": isa}})
    cost = float((expected - exact).square().mean())
    assert cost > 0 and float((found - expected).square().mean()) < cost / 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_a_cache_in_8_bits(model: str, dtype: str) -> None:
    """The quick matrix, to the bit. Dies if a prompt's own keys are read before they are codes, or a step goes with the wrong block."""
    report = Verifier(
        model, dtype=dtype, scale=QUICK, num_blocks=256, device="cpu/cpu", kv_cache_dtype="int8"
    ).run()  # fmt: skip
    assert report.has_passed, [
        (row.feature, row.differences, row.activity) for row in report.rows if not row.has_passed
    ]


def test_parts_of_a_cache_in_8_bits(model: str) -> None:
    """Its fusion is in use, the plain one is not."""
    with LLM(model, num_blocks=64, device="cpu/cpu", kv_cache_dtype="int8") as llm:
        used = {name: part for name, part in llm.info.kernels.items() if "kv_write" in name}
    assert used == {name: f"cpu/{name}" for name in ("kv_write", "kv_write_int8", "rope_kv_write_int8")}


def test_conformance() -> None:
    """Everything that is declared, on the best instruction set."""
    report = check_plugin("cpu", require_device=True)
    assert report.ok, report.text


@pytest.mark.slow
@pytest.mark.parametrize("isa", runnable()[1:])
def test_conformance_of_the_others(isa: str, tmp_path: Path) -> None:
    """Ops and attention, forced by a setting."""
    config = tmp_path / "xllm.toml"
    config.write_text(f'[plugin.cpu]\nisa = "{isa}"\n')
    report = check_plugin("cpu", require_device=True, config=config, arguments=("-k", "test_op or test_attention"))
    assert report.ok, report.text
